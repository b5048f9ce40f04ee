"""H2O while decoding: the heavy hitters so far and the recent tokens stay (arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from torch import Tensor

from kvevict.policies.base import LayerScores
from kvevict.policies.decode import (
    Victims,
    evictable,
    limit_lists,
    lowest,
    over_limit,
    received,
)

if TYPE_CHECKING:
    from kvevict.slots import Slots


class DecodeLimit:
    """A cache that has reached the policy's `keep` drops a key for every new one.

    A ratio `keep` refers to the prompt: the cache stays as long as it was after it. A number of
    tokens is reached first, if the prompt was shorter. 1.0 or more never evicts.

    Mix it into a `kvevict.policies.Policy`.
    """

    keep: float | int
    num_sink: int

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether `keep` is a limit at all."""
        return isinstance(self.keep, Integral) or self.keep < 1

    def begin(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Set the limit of every list to what the prompt's eviction left, or to `keep`."""
        limits = [slots.lens for slots in layers]
        if isinstance(self.keep, Integral):
            limits = [limit.clamp(min=int(self.keep)) for limit in limits]
        for slots, limit in zip(layers, limit_lists(layers, limits), strict=True):
            slots.memory["limit"] = limit


class DecodeH2O(DecodeLimit):
    r"""Every step adds its attention to the scores; over the limit, the lowest score goes.

    $S_j \leftarrow S_j + a_t[j]$ for every query row t that sees key j, the mean over the query
    heads of a KV head; then the keys beyond the limit are dropped, lowest S first, among those
    that are neither sinks nor recent: one per step. S starts with the scores of the prompt.

    O(kv_len) per step and list; the dropped key's slot takes the newest key.
    """

    def num_recent_of(self, limit: int | Tensor) -> int | Tensor:
        """Return how many of the newest keys are protected; half of the limit, as published."""
        return limit // 2

    def observe(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """Add the attention of the newest rows to the scores."""
        slots.scores.add_(received(slots, query, key_mask=key_mask, sm_scale=sm_scale))

    def evict(self, layers: Sequence[Slots]) -> list[Victims | None]:
        """Return the lowest scores beyond the limit."""
        return [self._evict(slots) for slots in layers]

    def _evict(self, slots: Slots) -> Victims | None:
        count, most = over_limit(slots)
        if most == 0:
            return None
        limit = slots.memory["limit"]
        assert not isinstance(limit, float)
        num_recent = self.num_recent_of(limit)
        num_sink = fitting(self.num_sink, limit - num_recent)
        candidates = evictable(slots, num_sink, num_recent)
        return lowest(slots.scores, candidates.byte(), count, most)


class DecodeStreamingLLM(DecodeLimit):
    """Over the limit, the oldest key that is not a sink goes (arXiv 2309.17453).

    No attention is looked at. Keys keep the rotation of their true positions.
    """

    def observe(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """See nothing."""

    def evict(self, layers: Sequence[Slots]) -> list[Victims | None]:
        """Return the oldest keys beyond the limit."""
        return [self._evict(slots) for slots in layers]

    def _evict(self, slots: Slots) -> Victims | None:
        count, most = over_limit(slots)
        if most == 0:
            return None
        limit = slots.memory["limit"]
        assert not isinstance(limit, float)
        candidates = evictable(slots, fitting(self.num_sink, limit), 0)
        return lowest(slots.positions.float(), candidates.byte(), count, most)


def fitting(count: int, room: int | Tensor) -> int | Tensor:
    """Return `count`, or as much of it as there is room for."""
    return min(count, room) if isinstance(room, int) else room.clamp(max=count)
