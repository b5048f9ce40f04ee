"""Kept keys and values in fresh memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvevict.ops._check import Check, check_kept_indices, check_kv_layers
from kvevict.ops._fake import register_fake


def gather_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kept_indices: Tensor,
    kept_lens: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Copies the kept rows of all layers, keys and values, into new tensors.

    Args:
        keys: per layer [batch_size, num_kv_heads, kv_len, head_dim], any dtype of 1, 2, 4 or 8
            bytes, any strides with a contiguous last dimension. kv_len and head_dim may differ
            from layer to layer, head_dim and dtype between keys and values.
        values: per layer, the keys' shape but for head_dim.
        kept_indices: [batch_size, num_kv_heads | 1, k] for all layers, or [num_layers | 1,
            batch_size, num_kv_heads | 1, k]; int32, strictly ascending.
        kept_lens: kept_indices' shape without k, int32: entries beyond it are ignored. Every entry
            counts if None.

    Returns:
        New keys and values, per layer [batch_size, num_kv_heads, k, head_dim], contiguous; rows
        beyond kept_lens are 0.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of kept_indices and
            kept_lens are checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.

    Moves 2 * k rows per layer, sequence and head, once; no extra memory beside the result.
    """
    new_keys, new_values = torch.ops.kvevict.gather_kv(keys, values, kept_indices, kept_lens)
    return new_keys, new_values


@register_fake("gather_kv")
def _(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kept_indices: Tensor,
    kept_lens: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    check = Check("gather_kv")
    check_kv_layers(check, keys, values)
    batch_size, num_kv_heads = keys[0].shape[:2]
    shape = (len(keys), batch_size, num_kv_heads)
    check_kept_indices(check, kept_indices, kept_lens, shape, keys[0])
    k = kept_indices.shape[-1]
    new_keys, new_values = (
        [t.new_empty((batch_size, num_kv_heads, k, t.shape[3])) for t in tensors]
        for tensors in (keys, values)
    )
    return new_keys, new_values
