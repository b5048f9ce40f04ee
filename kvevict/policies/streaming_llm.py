"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvevict.policies.base import LayerScores, Policy, Prompt


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first and the newest tokens stay, the block between them goes; nothing is scored.

    One list for all layers and heads. The budget is `keep` tokens per layer, sinks included; a
    budget below twice `num_sink` gives its older half to sinks. Keys keep the rotation they have;
    the published form stores them unrotated and counts positions inside the cache.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (4, as published).
    """

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
