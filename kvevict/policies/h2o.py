"""H2O: heavy hitters and recent tokens (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from kvevict.policies._shares import floor_share
from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.policies.decode import Victims, evictable, lowest
from kvevict.policies.limit import DecodeLimit, fitting, share_of
from kvevict.priority import build_priority

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True)
class H2O(DecodeLimit, Policy):
    r"""The keys with the most attention accumulated over all rows stay, and the newest ones.

    Score of key j in KV head g: the attention that j got from every row of the prompt, summed over
    rows, averaged over the query heads of the group. (The released code keeps a list per query head
    of repeated keys; a list per KV head is the form for grouped-query attention.)

    While decoding, every step adds its attention to the scores, $S_j \leftarrow S_j + a_t[j]$, and
    a list beyond its budget drops the lowest S that is neither sink nor recent: one key per step.

    The budget is `keep` tokens per layer and KV head: sinks, recent and heavy together.

    All rows vote, so scoring a prompt takes O(kv_len^2) time per layer (and O(kv_len) memory); a
    step takes O(kv_len).

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (0 in the published form, whose sums favor them anyway).
        recent_share: the part of the budget that goes to the newest tokens (half, as published).
        normalize: divide each sum by the number of rows that see the key. It takes away the bias
            to early tokens and is another method, kvpress' "observed attention"; that one has
            `num_sink=0, recent_share=0` and appends while decoding, whatever `decode` says.
        decode: "evict", or "append" to leave the cache alone after the prompt.
    """

    recent_share: float = 0.5
    normalize: bool = False
    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("recent_share")
        self._require_one_of("decode", ("evict", "append"))

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether there is a limit; the means over rows of `normalize` cannot be continued."""
        return super().evicts_while_decoding and not self.normalize

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **options: Any,
    ) -> LayerScores:
        """Accumulate the attention of all rows [batch_size, num_kv_heads, kv_len]."""
        layer = super().observe(query, key, value, prompt, row_index, **options)
        if not self.normalize:
            return layer
        num_rows = prompt.valid[:, prompt.kv_len - prompt.num_queries :].sum(1, keepdim=True)
        seen_by = (prompt.rank_from_end + 1).minimum(num_rows).clamp(min=1)
        return replace(layer, scores=layer.scores / seen_by[:, None])

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the recent part of the budget, and the sinks that fit into the rest."""
        num_recent = floor_share(budget, self.recent_share)
        num_sink = (budget - num_recent).clamp(max=self.num_sink)
        return build_priority(prompt.valid, num_sink=num_sink, num_recent=num_recent)

    def choose_victims(
        self, slots: Slots, limit: int | Tensor, count: int | Tensor, most: int
    ) -> Victims | None:
        """Choose the lowest scores that are neither sinks nor recent."""
        num_recent = share_of(limit, self.recent_share)
        candidates = evictable(slots, fitting(self.num_sink, limit - num_recent), num_recent)
        return lowest(slots.scores, candidates.byte(), count, most)
