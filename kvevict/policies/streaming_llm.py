"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.policies.decode import Victims, evictable, lowest
from kvevict.policies.limit import DecodeLimit, fitting

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True)
class StreamingLLM(DecodeLimit, Policy):
    """The first and the newest tokens stay, the block between them goes; nothing is scored.

    One list for all layers and heads. The budget is `keep` tokens per layer, sinks included; a
    budget below twice `num_sink` gives its older half to sinks. Keys keep the rotation they have;
    the published form stores them unrotated and counts positions inside the cache. While decoding,
    the oldest key that is not a sink goes for every new one.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (4, as published).
        decode: "evict", or "append" to leave the cache alone after the prompt.
    """

    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("decode", ("evict", "append"))

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        """Score a key by its age [batch_size, 1, kv_len]."""
        return LayerScores(scores=prompt.rank_from_start.float()[:, None], prompt=prompt)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the sinks, but never against the newer half of the budget."""
        return self.force(prompt, budget, num_recent=budget)

    def observe_step(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """See nothing."""

    def choose_victims(
        self, slots: Slots, limit: int | Tensor, count: int | Tensor, most: int
    ) -> Victims | None:
        """Choose the oldest keys that are not sinks."""
        candidates = evictable(slots, fitting(self.num_sink, limit), 0)
        return lowest(slots.positions.float(), candidates.byte(), count, most)
