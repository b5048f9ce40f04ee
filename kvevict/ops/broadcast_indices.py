"""One decision for all layers and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import ANY, INDEX_END, Check, check_kept_indices
from kvevict.ops._fake import register_fake


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
    """Writes index lists out for every layer and head, HAE's index broadcasting (arXiv 2602.02197).

    The other ops take shared lists directly and need no such copy. What needs it is composing a
    list with an earlier eviction, and the slots of a paged cache.

    Args:
        kept_indices: [batch_size, num_kv_heads | 1, k] or [num_layers | 1, batch_size,
            num_kv_heads | 1, k] int32, strictly ascending up to kept_lens.
        kept_lens: kept_indices' shape without k, int32.
        num_layers: of the result.
        num_kv_heads: of the result.
        base_indices: [num_layers | 1, batch_size, num_kv_heads | 1, k0] int32, kept by an earlier
            eviction, strictly ascending and then -1: entries of kept_indices are places in it.
        block_tables: [num_layers | 1, batch_size, max_pages] int32, -1 for no page. Positions
            become slots ``page * page_size + position % page_size`` where ``page`` is
            ``block_tables[..., position // page_size]``; slots need not ascend.
        page_size: of the paged cache; needed with block_tables.

    Returns:
        [num_layers, batch_size, num_kv_heads, k] int32, -1 beyond kept_lens, and wherever
        base_indices or block_tables has -1.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values are checked on the
            CPU, and on CUDA if ``KVEVICT_DEBUG=1``.

    O(num_layers * batch_size * num_kv_heads * k) time, no extra memory.
    """
    indices: Tensor = torch.ops.kvevict.broadcast_indices(
        kept_indices,
        kept_lens,
        num_layers,
        num_kv_heads,
        base_indices=base_indices,
        block_tables=block_tables,
        page_size=page_size,
    )
    return indices


@register_fake("broadcast_indices")
def _(
    kept_indices: Tensor,
    kept_lens: Tensor,
    num_layers: int,
    num_kv_heads: int,
    *,
    base_indices: Tensor | None = None,
    block_tables: Tensor | None = None,
    page_size: int = 0,
) -> Tensor:
    check = Check("broadcast_indices")
    check.at_least(num_layers, "num_layers", 1)
    check.at_least(num_kv_heads, "num_kv_heads", 1)
    layers, heads = (num_layers, 1), (num_kv_heads, 1)
    if kept_indices.dim() < 3:
        check.shape(kept_indices, "kept_indices", ANY, heads, ANY)
    batch_size = kept_indices.shape[-3]
    if base_indices is not None:
        shape = (layers, batch_size, heads, ANY)
        check.companion(
            base_indices, "base_indices", torch.int32, shape, kept_indices, "kept_indices"
        )
        check.indexable(base_indices, "base_indices", 3, "k")
    if block_tables is not None:
        check.companion(
            block_tables,
            "block_tables",
            torch.int32,
            (layers, batch_size, ANY),
            kept_indices,
            "kept_indices",
        )
        check.in_range(page_size, "page_size", 1, INDEX_END)
    check_kept_indices(
        check,
        kept_indices,
        kept_lens,
        (num_layers, batch_size, num_kv_heads),
        kept_indices,
        "kept_indices",
    )
    return kept_indices.new_empty((num_layers, batch_size, num_kv_heads, kept_indices.shape[-1]))
