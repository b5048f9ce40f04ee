"""DBudgetKV: prune until the attention matrix would change (arXiv 2502.16886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.policies._shares import keep_whole
from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.priority import ORDINARY


@dataclass(frozen=True)
class DBudgetKV(Policy):
    """No preset budget: the oldest keys go as long as the attention matrix keeps its norm.

    Importance is a fixed order, first and most recent tokens high: sinks and the last `num_recent`
    stay, and the others go oldest first. A layer stops before the Frobenius norm of its attention
    (all rows, all heads, columns of evicted keys taken out) falls by more than `tolerance`. The
    first `num_full` layers are exempt. One list per layer.

    Known from the abstract and from memory only: the order, the exempt layers and `num_recent` are
    not checked against the paper.

    `keep` limits the total, everything included: L layers hold at most L * `keep` tokens. The
    exempt layers take what they need of it, as far as it leaves the others their forced keys, and
    these share the rest evenly; a prompt that fits into `keep` stays whole.

    All rows vote, so scoring takes O(kv_len^2) time per layer (and O(kv_len) memory).

    Attributes:
        keep: at most this much of the prompt (float) or tokens per layer on average (int); None =
            no limit.
        num_sink: first tokens that stay.
        num_recent: last tokens that stay (1).
        tolerance: how much of the norm may be lost (0.01).
        num_full: first layers that are not pruned (2).
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN
    statistic: ClassVar[Statistic] = Statistic.SUM_OF_SQUARES
    sets_budget: ClassVar[bool] = True

    keep: float | int | None = None
    num_recent: int = 1
    tolerance: float = 0.01
    num_full: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("num_recent", minimum=0)
        self._require_fraction("tolerance")
        self._require_count("num_full", minimum=0)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Prune up to the tolerance, inside the limit [num_layers, batch_size] int64."""
        num_full = min(self.num_full, len(layers))
        num_other = len(layers) - num_full
        lens = torch.stack([layer.prompt.lens for layer in layers])
        needed = [*lens[:num_full], *(self._size(layer) for layer in layers[num_full:])]
        if self.keep is None:
            return torch.stack(needed)
        total = torch.stack([self.keep_tokens(layer.prompt) for layer in layers]).sum(0)
        least = sum(self.num_forced(layer.prompt) for layer in layers[num_full:])
        full = lens[:num_full].minimum((total - least) // max(num_full, 1))
        other = ((total - full.sum(0)) // max(num_other, 1)).expand(num_other, -1)
        limits = torch.cat([full, other])
        return keep_whole(self, layers, torch.stack(needed).minimum(limits))

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the sinks and the last tokens that fit `keep`, in every layer alike."""
        return self.force(prompt, self.keep_tokens(prompt), num_recent=self.num_recent)

    def ranking(self, layer: LayerScores, priority: Tensor) -> Tensor:
        """Prefer the newer key."""
        return layer.prompt.rank_from_start.float()[:, None]

    def _size(self, layer: LayerScores) -> Tensor:
        """Return how many keys one layer needs [batch_size] int64."""
        energy = layer.scores[:, 0].where(layer.prompt.valid, 0.0).double()
        may_go = self.priority(layer.prompt, self.keep_tokens(layer.prompt)) == ORDINARY
        lost = energy.where(may_go, 0.0).cumsum(1)
        bearable = energy.sum(1, keepdim=True) * (1 - (1 - self.tolerance) ** 2)
        return layer.prompt.lens - (may_go & (lost <= bearable)).sum(1)
