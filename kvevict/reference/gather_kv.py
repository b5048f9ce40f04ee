"""Oracle of `kvevict.gather_kv`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvevict.reference.broadcast_indices import expand_lists


def gather_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kept_indices: Tensor,
    kept_lens: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the kept rows [batch_size, num_kv_heads, k, head_dim] of every layer, 0 beyond."""
    if len(keys) == 0:
        return [], []
    indices, lens = expand_lists(kept_indices, kept_lens, len(keys), keys[0].shape[1])
    layers = list(zip(indices, lens, strict=True))
    return (
        [gather_rows(key, *layer) for key, layer in zip(keys, layers, strict=True)],
        [gather_rows(value, *layer) for value, layer in zip(values, layers, strict=True)],
    )


def gather_rows(source: Tensor, indices: Tensor, lens: Tensor) -> Tensor:
    """Return rows `indices` [batch_size, num_kv_heads, k] of `source`, 0 beyond `lens`."""
    batch_size, num_kv_heads, k = indices.shape
    result = source.new_zeros(batch_size, num_kv_heads, k, source.shape[3])
    for b in range(batch_size):
        for h in range(num_kv_heads):
            count = int(lens[b, h])
            result[b, h, :count] = source[b, h, indices[b, h, :count].long()]
    return result
