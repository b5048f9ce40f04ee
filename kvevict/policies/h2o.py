"""H2O: heavy hitters and recent tokens (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kvevict.policies._shares import floor_share
from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.priority import build_priority


@dataclass(frozen=True)
class H2O(Policy):
    """The keys with the most attention accumulated over all rows stay, and the newest ones.

    Score of key j in KV head g: the attention that j got from every row of the prompt, summed over
    rows, averaged over the query heads of the group. (The released code keeps a list per query head
    of repeated keys; a list per KV head is the form for grouped-query attention.) This is the
    prefill part of the method; its rule for decoding is not applied.

    The budget is `keep` tokens per layer and KV head: sinks, recent and heavy together.

    All rows vote, so scoring takes O(kv_len^2) time per layer (and O(kv_len) memory).

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (0 in the published form, whose sums favor them anyway).
        recent_share: the part of the budget that goes to the newest tokens (half, as published).
        normalize: divide each sum by the number of rows that see the key. It takes away the bias
            to early tokens and is another method, kvpress' "observed attention"; that one has
            `num_sink=0, recent_share=0`.
    """

    recent_share: float = 0.5
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("recent_share")

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
