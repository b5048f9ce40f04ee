"""What methods share whose cache stops growing at a limit."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from kvevict.policies._shares import floor_share
from kvevict.policies.base import LayerScores
from kvevict.policies.decode import Victims, accumulate, limit_lists, over_limit

if TYPE_CHECKING:
    from kvevict.slots import Slots


class DecodeLimit:
    """A list that has reached the policy's `keep` drops a key for every new one.

    A ratio `keep` refers to the prompt: lists stay as long as they are after it. A number of tokens
    may be reached later, if the prompt was shorter. Without a `keep` below 1 nothing is evicted.

    Mix it into a `kvevict.policies.Policy` that has the field `decode`, and `decay` if sums decay.
    """

    keep: float | int | None
    num_sink: int
    decode: Literal["evict", "append"]
    decay: float = 1.0

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether there is a limit."""
        limits = isinstance(self.keep, Integral) or (self.keep is not None and self.keep < 1)
        return limits and self.decode == "evict"

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Set the limit of every list."""
        limits = self.limits(layers, scores)
        for slots, limit in zip(layers, limit_lists(layers, limits), strict=True):
            slots.memory["limit"] = limit

    def limits(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> list[Tensor]:
        """Return what the prompt's eviction left, or `keep`, per layer [batch_size, num_lists]."""
        limits = [slots.lens for slots in layers]
        if isinstance(self.keep, Integral):
            limits = [limit.clamp(min=int(self.keep)) for limit in limits]
        return limits

    def observe_step(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """Let the scores decay and add the attention of the newest rows."""
        accumulate(slots, query, decay=self.decay, key_mask=key_mask, sm_scale=sm_scale)

    def evict_step(self, layers: Sequence[Slots]) -> list[Victims | None]:
        """Return the keys beyond the limit, those that `choose_victims` prefers."""
        return [self._evict_layer(slots) for slots in layers]

    def _evict_layer(self, slots: Slots) -> Victims | None:
        count, most = over_limit(slots)
        if most == 0:
            return None
        limit = slots.memory["limit"]
        assert not isinstance(limit, float)
        return self.choose_victims(slots, limit, count, most)

    def choose_victims(
        self, slots: Slots, limit: int | Tensor, count: int | Tensor, most: int
    ) -> Victims | None:
        """Choose `count` keys of every list, which holds that many more than `limit`.

        Args:
            slots: one layer.
            limit: keys that stay, [batch_size, num_lists] where lists differ.
            count: keys that go, likewise.
            most: the largest count, or more.
        """
        raise AssertionError("a subclass chooses")


def share_of(limit: int | Tensor, share: float) -> int | Tensor:
    """Return limit * share, rounded down as `floor_share` does."""
    return int(limit * share + 1e-6) if isinstance(limit, int) else floor_share(limit, share)


def smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    """Return the smaller one, list by list where limits differ."""
    if isinstance(a, int):
        return fitting(a, b)
    return fitting(b, a) if isinstance(b, int) else a.minimum(b)


def fitting(count: int, room: int | Tensor) -> int | Tensor:
    """Return `count`, or as much of it as there is room for."""
    return min(count, room) if isinstance(room, int) else room.clamp(max=count)
