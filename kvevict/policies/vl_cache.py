"""VL-Cache: sparse layers get less, and text after the image decides (arXiv 2410.23317)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction
from kvevict.policies._shares import floor_share, keep_whole, share_by_mass
from kvevict.policies.base import LayerScores, Policy, Prompt

ROWS_AT_ONCE = 256
"""Rows of attention, of all query heads of a group together, that exist at the same time."""


@dataclass(frozen=True)
class VLCache(Policy):
    r"""Layer budgets by how dense the attention of the trailing text is.

    Rows are the text rows after the last vision token (all rows of a sequence that has none).

    - An entry of these rows counts as used if it reaches `threshold` times the largest of its row;
      $d_l$ is the used part of the entries that causality allows, over all heads.
    - Layer l keeps the fraction $\beta_l = clip(L \cdot keep \cdot d_l / \sum d, 0.01, 1)$.
    - Score of a key: its attention from these rows, averaged over heads; one list per layer. The
      newest `recent_share` of a layer's budget stay without competing.

    Budgets are inside `keep`: sinks, recent keys and all. As in the source, what a layer loses by
    the upper clip is not given to others (see `redistribute`), and the lower clip may add up to
    0.01 N tokens per layer. Formulas follow the re-implementation in EffiVLM-Bench; the paper was
    known second-hand.

    Counting entries needs attention weights, so `observe` computes logits in blocks of
    `ROWS_AT_ONCE` rows, in float32 and outside the fused ops: O(ROWS_AT_ONCE * kv_len) memory.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that stay (0 in the published form).
        threshold: of a row's largest entry, what an entry must reach to count (0.01).
        recent_share: the part of a layer's budget that goes to its newest tokens (0.1).
        redistribute: give what layers beyond N tokens cannot use to the others, in proportion
            (water filling). Off in the source, where it is lost.
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN

    threshold: float = 0.01
    recent_share: float = 0.1
    redistribute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("threshold")
        self._require_fraction("recent_share")

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the text rows after the last vision token, or all rows where there are none."""
        return prompt.trailing_rows()

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        *,
        sm_scale: float | None = None,
        **options: Any,
    ) -> LayerScores:
        """Score the keys [batch_size, 1, kv_len] and measure how dense the layer is."""
        rows = self.row_index(prompt) if row_index is None else row_index
        layer = super().observe(query, key, value, prompt, rows, sm_scale=sm_scale, **options)
        margin = -math.log(self.threshold) if self.threshold > 0 else math.inf
        scale = query.shape[3] ** -0.5 if sm_scale is None else sm_scale
        return replace(layer, mass=_density(query, key, prompt, rows, scale, margin))

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Share the budget by density [num_layers, batch_size] int64."""
        lens = torch.stack([layer.prompt.lens for layer in layers])
        fraction = share_by_mass(self, layers, redistribute=self.redistribute).clamp(0.01, 1.0)
        return keep_whole(self, layers, floor_share(lens, fraction).clamp(min=1))

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the newest part of the layer's budget, and the sinks."""
        num_recent = floor_share(budget, self.recent_share).clamp(min=1)
        return self.force(prompt, budget, num_recent=num_recent)


def _density(
    query: Tensor, key: Tensor, prompt: Prompt, row_index: Tensor, sm_scale: float, margin: float
) -> Tensor:
    """Return the part of the entries whose logits are within `margin` of their row's largest.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim].
        key: [batch_size, num_kv_heads, kv_len, head_dim].
        prompt: what the keys are.
        row_index: [batch_size, num_rows] int32, -1 = none.
        sm_scale: the scale of the logits.
        margin: at least 0.

    Returns:
        [batch_size] float32 over all heads and rows, of the entries that causality allows.
    """
    batch_size, num_qo_heads, qo_len, _ = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    group_size = num_qo_heads // num_kv_heads
    sequence = torch.arange(batch_size, device=query.device)[:, None]
    column = torch.arange(kv_len, device=query.device)
    num_rows = max(1, ROWS_AT_ONCE // group_size)
    used = torch.zeros(batch_size, dtype=torch.int64, device=query.device)
    allowed = torch.zeros_like(used)
    for head in range(num_kv_heads):
        head_keys = key[:, head, None].float()
        for first in range(0, row_index.shape[1], num_rows):
            block = row_index[:, first : first + num_rows].long()
            seen = column <= (kv_len - qo_len + block)[..., None]
            seen = (seen & (block >= 0)[..., None] & prompt.valid[:, None])[:, :, None]
            group = query[:, head * group_size : (head + 1) * group_size]
            logits = group[sequence, :, block].float() @ head_keys.mT * sm_scale
            logits = logits.masked_fill(~seen, -torch.inf)
            passing = (logits >= logits.amax(-1, keepdim=True) - margin) & seen
            used += passing.sum((1, 2, 3))
            allowed += seen.sum((1, 2, 3)) * group_size
    return used.float() / allowed.clamp(min=1)
