"""Rows of a growing cache evicted, in place and in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvevict.ops._check import Check, check_index_lists, check_kv_layers, check_list_lens
from kvevict.ops._fake import register_fake


def evict_slots_(
    keys: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor, kv_lens: Tensor
) -> None:
    """Evicts slots of all layers, keys and values, and fills the holes from behind, in place.

    The eviction of decoding: where TGV-KV (arXiv 2606.03075) and H2O (arXiv 2306.14048) copy the
    cache to drop a row per step, this moves one row. With e evictions from a list of kv_len live
    rows, its first ``kv_len - e`` slots are live afterwards: the i-th evicted slot among them gets
    the i-th surviving row of those behind, both in ascending order. Attention does not mind the new
    order of keys, which carry their rotation; what else is kept per slot, such as positions or
    scores, moves along as further members of the lists. Nothing else is written; rows from
    ``kv_len - e`` on are unspecified afterwards. A refused call leaves every byte as it was.

    Args:
        keys: per layer [batch_size, num_kv_heads, capacity, head_dim], any dtype of 1, 2, 4 or 8
            bytes, any strides with a contiguous last dimension; no two tensors may share elements.
            capacity and head_dim may differ from layer to layer.
        values: per layer, the keys' shape but for head_dim, which may be 0.
        slots: [batch_size, num_kv_heads | 1, k] for all layers, or [num_layers | 1, batch_size,
            num_kv_heads | 1, k]; int32, the slots to evict: strictly ascending, each below its
            list's kv_len, then -1. k may exceed kv_len.
        kv_lens: [batch_size, num_kv_heads | 1] for all layers, or [num_layers | 1, batch_size,
            num_kv_heads | 1]; int32, how many of the first slots are live, at most capacity.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of slots and kv_lens
            are checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.
        RuntimeError: if autograd forbids to write a key or value: it requires grad outside of
            ``torch.no_grad()``, or is an inference tensor outside of inference mode.

    Moves at most 2 * e rows per layer, sequence and head, none twice. No extra memory. Arguments
    are checked tensor by tensor: for the shortest call, give a cache that is one tensor for all
    layers as one layer of num_layers * batch_size sequences.
    """
    torch.ops.kvevict.evict_slots_(keys, values, slots, kv_lens)


@register_fake("evict_slots_")
def _(keys: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor, kv_lens: Tensor) -> None:
    check = Check("evict_slots_")
    check_kv_layers(check, keys, values)
    shape = (len(keys), keys[0].shape[0], keys[0].shape[1])
    check_index_lists(check, slots, "slots", shape, keys[0], "keys[0]")
    check_list_lens(check, kv_lens, "kv_lens", shape, keys[0], "keys[0]")
