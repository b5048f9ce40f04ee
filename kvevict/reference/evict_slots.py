"""Oracle of `kvevict.evict_slots_`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def evict_slots_(
    keys: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor, kv_lens: Tensor
) -> None:
    """Fill the evicted slots of every layer from behind, in place. The tail stays as it is."""
    if len(keys) == 0:
        return
    lists, lens = expand_slots(slots, kv_lens, len(keys), keys[0].shape[1])
    for key, value, layer_lists, layer_lens in zip(keys, values, lists, lens, strict=True):
        for b in range(key.shape[0]):
            for h in range(key.shape[1]):
                evicted = [slot for slot in layer_lists[b, h].tolist() if slot >= 0]
                for hole, survivor in list_moves(evicted, int(layer_lens[b, h])):
                    key[b, h, hole] = key[b, h, survivor]
                    value[b, h, hole] = value[b, h, survivor]


def expand_slots(
    slots: Tensor, kv_lens: Tensor, num_layers: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Return slots [num_layers, batch_size, num_kv_heads, k] and kv_lens without k.

    3-D slots and 2-D kv_lens serve every layer.
    """
    slots = slots[None] if slots.dim() == 3 else slots
    kv_lens = kv_lens[None] if kv_lens.dim() == 2 else kv_lens
    return (
        slots.expand(num_layers, -1, num_kv_heads, -1),
        kv_lens.expand(num_layers, -1, num_kv_heads),
    )


def list_moves(evicted: list[int], kv_len: int) -> list[tuple[int, int]]:
    """Return (destination, source) of the rows that must move for `evicted` to go."""
    new_len = kv_len - len(evicted)
    holes = [slot for slot in evicted if slot < new_len]
    survivors = [slot for slot in range(new_len, kv_len) if slot not in evicted]
    return list(zip(holes, survivors, strict=True))
