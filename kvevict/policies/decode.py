"""Methods that evict while tokens are generated.

An engine keeps the keys of every layer in `kvevict.slots.Slots` and calls a `DecodePolicy`

1. once after the prompt: `begin_decoding(layers, scores)`;
2. in every later forward, in every layer: `observe_step(slots, query)`;
3. after the last layer of that forward: `evict_step(layers)`, and drops the slots it returns
   (`kvevict.slots.evict_layers`).

The number of keys is known to the host as long as all lists of a layer grow and shrink alike
(`Slots.grown`), and so is whether anything is due: then nothing waits for the device, and no mask
is needed. Lists that differ are counted on the device, which does not wait either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction
from kvevict.policies._weighted import score_weighted
from kvevict.policies.base import LayerScores

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True, eq=False)
class Victims:
    """Slots of one layer to drop.

    Attributes:
        slots: [batch_size, num_lists, num_evicted] int32, ascending, -1 beyond evicted_lens.
        evicted_lens: [batch_size, num_lists] int32, None = every list drops num_evicted keys.
    """

    slots: Tensor
    evicted_lens: Tensor | None = None


@runtime_checkable
class DecodePolicy(Protocol):
    """Decides while tokens are generated."""

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether it ever does; if not, the engine only appends and calls nothing."""
        ...

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Prepare for what comes after the prompt; the layers' `memory` is the policy's.

        Args:
            layers: what is stored after the prompt; `Slots.scores` holds the scores of the kept
                keys.
            scores: what the policy saw of each layer of the whole prompt.
        """
        ...

    def observe_step(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """See the attention of the newest rows to the stored keys, their own included.

        Args:
            slots: one layer, the keys of these rows being its last.
            query: [batch_size, num_qo_heads, qo_len, head_dim], as attention uses it (rotated).
            key_mask: [batch_size, num_lists, stored] bool, False = an empty slot or padding; None
                = all real.
            sm_scale: the scale of the logits; None = 1 / sqrt(head_dim).
        """
        ...

    def evict_step(self, layers: Sequence[Slots]) -> Sequence[Victims | None]:
        """Return what to drop of every layer, None = nothing.

        A method that merges does so here, in the slots' keys, values and weights.
        """
        ...


def begin_decoding(
    policy: DecodePolicy, layers: Sequence[Slots], scores: Sequence[LayerScores]
) -> None:
    """Start a policy on what the eviction of a prompt has left."""
    for slots in layers:
        slots.grown = slots.pending = 0
        slots.memory = {}
    policy.begin_decoding(layers, scores)


def received(
    slots: Slots, query: Tensor, *, key_mask: Tensor | None = None, sm_scale: float | None = None
) -> Tensor:
    """Return the attention that each stored key gets, summed over the newest rows.

    The mean over the query heads that share a list: all of them, or those of the list's KV head.

    Args:
        slots: the keys.
        query: the newest rows [batch_size, num_qo_heads, qo_len, head_dim].
        key_mask: [batch_size, num_lists, stored] bool, None = all real.
        sm_scale: the scale of the logits; None = 1 / sqrt(head_dim).

    Returns:
        [batch_size, num_lists, stored] float32.
    """
    if slots.key_weight is not None:
        return _received_by_weight(slots, query, key_mask, sm_scale)
    query, key, options = _as_rows(slots, query, key_mask)
    scores = ops.score_keys(query, key, sm_scale=sm_scale, **options)
    return scores.view(slots.columns.shape)


def accumulate(
    slots: Slots,
    query: Tensor,
    *,
    decay: float = 1.0,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
) -> None:
    """Add what `received` returns to the scores of the slots, which decay first."""
    if slots.key_weight is not None:
        own = _received_by_weight(slots, query, key_mask, sm_scale)
        slots.scores.mul_(decay).add_(own)
        return
    query, key, options = _as_rows(slots, query, key_mask)
    # Of the folded shape, if lists are folded.
    scores = slots.scores.view(len(key), -1, slots.stored)
    ops.accumulate_scores_(scores, query, key, decay=decay, sm_scale=sm_scale, **options)


def _received_by_weight(
    slots: Slots, query: Tensor, key_mask: Tensor | None, sm_scale: float | None
) -> Tensor:
    assert slots.key_weight is not None
    scores = score_weighted(
        query, slots.keys, slots.key_weight, key_mask=key_mask, sm_scale=sm_scale
    )
    return scores if slots.columns.shape[1] > 1 else scores.mean(1, keepdim=True)


def _as_rows(
    slots: Slots, query: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return query, key and options with which the scoring ops give a score per list."""
    key, num_lists = slots.keys, slots.columns.shape[1]
    if key_mask is not None and num_lists > 1:
        # Masks of the ops are per sequence: every KV head becomes a sequence of its own.
        query = query.reshape(-1, query.shape[1] // num_lists, *query.shape[2:])
        key = key.flatten(0, 1)[:, None]
    reduction = HeadReduction.ALL_MEAN if num_lists == 1 else HeadReduction.GROUP_MEAN
    mask = None if key_mask is None else key_mask.flatten(0, 1)
    return query, key, {"key_mask": mask, "head_reduction": reduction}


def limit_lists(layers: Sequence[Slots], limits: Sequence[Tensor]) -> list[int | Tensor]:
    """Set how many keys a list may hold; what `over_limit` counts from.

    Args:
        layers: what is stored now.
        limits: per layer [batch_size, num_lists] int64.

    Returns:
        The limits, as ints where they are the same for all lists. Synchronizes with the device.
    """
    rooms = [limit - slots.lens for slots, limit in zip(layers, limits, strict=True)]
    least = torch.stack([room.amin() for room in rooms]).tolist()
    for slots, room, low in zip(layers, shared_ints(rooms), least, strict=True):
        slots.memory["room"] = room
        slots.pending = max(0, -low)
    return shared_ints(limits)


def shared_ints(values: Sequence[Tensor]) -> list[int | Tensor]:
    """Return integer tensors as ints where all elements agree. Synchronizes, once."""
    bounds = torch.stack([torch.stack([v.amin(), v.amax()]) for v in values]).tolist()
    return [
        low if low == high else value for (low, high), value in zip(bounds, values, strict=True)
    ]


def over_limit(slots: Slots, *, at_least: int = 1) -> tuple[int | Tensor, int]:
    """Return how many keys of each list are beyond its limit, and an upper bound of it.

    Args:
        slots: one layer.
        at_least: fewer than this count as none.

    Returns:
        The number, an int where all lists agree, else [batch_size, num_lists] int64; and the most
        that it can be, always known to the host.
    """
    room = slots.memory["room"]
    over = slots.grown - room
    if isinstance(over, Tensor):
        return over.where(over >= at_least, 0), slots.pending + at_least - 1
    over = int(over) if over >= at_least else 0
    return over, over


def evictable(slots: Slots, num_sink: int | Tensor, num_recent: int | Tensor) -> Tensor:
    """Return the keys that are neither sinks nor recent [batch_size, num_lists, stored] bool.

    Args:
        slots: one layer.
        num_sink: how many of the first tokens of a conversation are protected, per list or int.
        num_recent: how many of the last.
    """
    num_sink, num_recent = (
        n[..., None] if isinstance(n, Tensor) else n for n in (num_sink, num_recent)
    )
    positions = slots.positions
    middle = (positions >= num_sink) & (positions < slots.totals[:, None, None] - num_recent)
    return middle & (slots.columns >= 0) if slots.has_empty else middle


def lowest(scores: Tensor, priority: Tensor, count: int | Tensor, most: int) -> Victims | None:
    """Return the slots with the lowest scores, ties at the lower slot.

    Args:
        scores: [batch_size, num_lists, stored] float32; NaN counts as the highest.
        priority: like scores, uint8: 0 = not to be dropped, a higher class goes first.
        count: how many per list; [batch_size, num_lists] where they differ.
        most: the largest of them, or more.
    """
    if most == 0:
        return None
    if isinstance(count, int):
        slots, _ = ops.select_topk(-scores, count, priority=priority)
        return Victims(slots)
    return Victims(*ops.select_topk(-scores, most, row_k=count.int(), priority=priority))
