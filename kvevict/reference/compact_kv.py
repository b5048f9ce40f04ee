"""Oracle of `kvevict.compact_kv_`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvevict.reference.broadcast_indices import expand_lists


def compact_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kept_indices: Tensor,
    kept_lens: Tensor | None = None,
) -> None:
    """Move the kept rows of every layer to the front, in place. The tail stays as it is."""
    if len(keys) == 0:
        return
    indices, lens = expand_lists(kept_indices, kept_lens, len(keys), keys[0].shape[1])
    for key, value, layer_indices, layer_lens in zip(keys, values, indices, lens, strict=True):
        compact_rows_(key, layer_indices, layer_lens)
        compact_rows_(value, layer_indices, layer_lens)


def compact_rows_(cache: Tensor, indices: Tensor, lens: Tensor) -> None:
    """Move rows `indices` [batch_size, num_kv_heads, k] of `cache` to its front."""
    for b in range(indices.shape[0]):
        for h in range(indices.shape[1]):
            count = int(lens[b, h])
            cache[b, h, :count] = cache[b, h, indices[b, h, :count].long()].clone()
