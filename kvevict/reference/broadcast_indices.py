"""Oracle of `kvevict.broadcast_indices`."""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_indices(
    kept_indices: Tensor,
    kept_lens: Tensor,
    num_layers: int,
    num_kv_heads: int,
    *,
    base_indices: Tensor | None = None,
    block_tables: Tensor | None = None,
    page_size: int = 0,
) -> Tensor:
    """Return one list for every layer and head [num_layers, batch_size, num_kv_heads, k] int32."""
    indices, lens = expand_lists(kept_indices, kept_lens, num_layers, num_kv_heads)
    kept = torch.arange(indices.shape[-1], device=indices.device) < lens[..., None]
    positions = indices.long().where(kept, -1)
    if base_indices is not None:
        positions = _look_up(base_indices, positions)
    if block_tables is not None:
        page = _look_up(block_tables[:, :, None], positions.div(page_size, rounding_mode="floor"))
        positions = (page * page_size + positions % page_size).where(page >= 0, -1)
    return positions.int()


def expand_lists(
    kept_indices: Tensor, kept_lens: Tensor | None, num_layers: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Return lists [num_layers, batch_size, num_kv_heads, k] and their lengths.

    A 3-D list serves every layer. Without kept_lens every entry counts.
    """
    if kept_lens is None:
        kept_lens = torch.full_like(kept_indices.sum(-1), kept_indices.shape[-1])
    if kept_indices.dim() == 3:
        kept_indices, kept_lens = kept_indices[None], kept_lens[None]
    indices = kept_indices.expand(num_layers, -1, num_kv_heads, -1)
    return indices, kept_lens.expand(num_layers, -1, num_kv_heads)


def _look_up(table: Tensor, entry: Tensor) -> Tensor:
    """Return table[..., entry] as int64, -1 for an entry of -1. Layers and heads broadcast."""
    missing = table.new_full((*table.shape[:-1], 1), -1)
    padded = torch.cat([table, missing], dim=-1).long().expand(*entry.shape[:-1], -1)
    return padded.gather(-1, entry.where(entry >= 0, table.shape[-1]))
