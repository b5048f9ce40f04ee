"""Kept keys and values moved to the front, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvevict.ops._check import Check, check_kept_indices, check_kv_layers
from kvevict.ops._fake import register_fake


def compact_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kept_indices: Tensor,
    kept_lens: Tensor | None = None,
) -> None:
    """Moves the kept rows of all layers, keys and values, to the front, in order and in place.

    Rows beyond the kept ones are unspecified afterwards. A refused call leaves every byte as it
    was.

    Args:
        keys: per layer [batch_size, num_kv_heads, kv_len, head_dim], any dtype of 1, 2, 4 or 8
            bytes, any strides with a contiguous last dimension; no two tensors may share elements.
            kv_len and head_dim may differ from layer to layer.
        values: per layer, the keys' shape but for head_dim.
        kept_indices: [batch_size, num_kv_heads | 1, k] for all layers, or [num_layers | 1,
            batch_size, num_kv_heads | 1, k]; int32, strictly ascending. k may exceed kv_len.
        kept_lens: kept_indices' shape without k, int32: entries beyond it are ignored. Every entry
            counts if None, and a -1 is then refused.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of kept_indices and
            kept_lens are checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.
        RuntimeError: if autograd forbids to write a key or value: it requires grad outside of
            ``torch.no_grad()``, or is an inference tensor outside of inference mode.

    Moves at most 2 * k rows per layer, sequence and head; rows in place already are skipped. No
    extra memory.
    """
    torch.ops.kvevict.compact_kv_(keys, values, kept_indices, kept_lens)


@register_fake("compact_kv_")
def _(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kept_indices: Tensor,
    kept_lens: Tensor | None = None,
) -> None:
    check = Check("compact_kv_")
    check_kv_layers(check, keys, values)
    shape = (len(keys), keys[0].shape[0], keys[0].shape[1])
    check_kept_indices(check, kept_indices, kept_lens, shape, keys[0])
