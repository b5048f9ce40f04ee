"""Rows to read the others against: what is known to be enough, or known not to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvevict import build_priority
from kvevict.policies import TEXT, LayerScores, Policy, Prompt, Random

_ABOVE_RANDOM = 2.0**24
"""More than any score that `Random` draws."""


@dataclass(frozen=True)
class RandomVision(Random):
    """All text stays, and a random choice of the vision tokens.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int), text included.
        num_sink: first tokens that stay whatever they are.
        seed: another seed, another choice.
        per_head: each layer and KV head chooses for itself; otherwise one list serves all.
    """

    num_sink: int = 1

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Prefer text to vision."""
        return self.force(prompt, budget, preferred=prompt.valid & (prompt.modality == TEXT))


@dataclass(frozen=True, eq=False)
class Oracle(RandomVision):
    """All text stays, then the needed vision tokens, then random ones.

    Attributes:
        keep: as in `RandomVision`, as are the fields below but the last.
        num_sink: first tokens that stay.
        seed: of the random ones.
        per_head: whether they differ by layer and KV head.
        needed: [batch_size, prompt_len] bool.
    """

    needed: Tensor = field(kw_only=True)

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Put the needed tokens above the others."""
        bonus = _ABOVE_RANDOM * self.needed[:, None].to(layers[0].scores)
        return [replace(scored, scores=scored.scores + bonus) for scored in super().revise(layers)]


@dataclass(frozen=True, eq=False)
class Without(Policy):
    """Given tokens go, in every layer and KV head, and nothing else does.

    Attributes:
        keep: not looked at.
        num_sink: not looked at.
        removed: [batch_size, prompt_len] bool; None = all vision tokens.
    """

    keep: float | int | None = 1.0
    num_sink: int = 0
    removed: Tensor | None = None

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        """Score 1 what stays, 0 what goes [batch_size, 1, kv_len]."""
        removed = prompt.is_vision if self.removed is None else self.removed
        return LayerScores(scores=(prompt.valid & ~removed)[:, None].float(), prompt=prompt)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return how many tokens stay [num_layers, batch_size]."""
        return torch.stack([layer.scores.sum((1, 2)).long() for layer in layers])

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force nothing."""
        return build_priority(prompt.valid)
