"""FlashCache: what deviates from the smooth part of keys and values stays (arXiv 2511.16786)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvevict.policies._shares import floor_share, keep_whole, share_by_mass
from kvevict.policies.base import LayerScores, Policy, Prompt

COEFFICIENTS_AT_ONCE = 256
"""Rows of the cosine basis that exist at the same time."""


@dataclass(frozen=True)
class FlashCache(Policy):
    r"""Attention-free: the high frequencies of keys and values, along the tokens, decide.

    The first `cutoff` N coefficients of the discrete cosine transform along the tokens make the
    smooth part of K and of V. Score of a token: its squared distance from the smooth part, the mean
    over heads and channels, of K plus that of V; one list per layer. Layer l keeps the fraction
    $clip(L \cdot keep \cdot R_l / \sum R, 0, 1)$ of its tokens, where $R_l$ is the part of the
    energy of K that lies above the cutoff plus that of V. Text goes before vision.

    Budgets are inside `keep`, sinks and text included; what a layer cannot use is lost unless
    `redistribute`. Known second-hand, no code was released: one list for all heads, the mean over
    heads, text first and the clip are choices made here.

    With C the cosine basis, the smooth part is $C^\top (C X)$, two thin matrix products with
    `COEFFICIENTS_AT_ONCE` rows of C at a time: O(cutoff * kv_len^2 * num_kv_heads * head_dim) time.
    They run in float32 on copies of one layer's keys, then values, outside the fused ops; where
    sums of a batch are grouped otherwise than alone, the last bits of scores may differ.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that stay (not in the published form).
        cutoff: the fraction of coefficients that make the smooth part (0.1; 0.1 to 0.2 published).
        text_first: text outranks vision, whatever its score.
        redistribute: give what layers beyond N tokens cannot use to the others, in proportion
            (water filling).
    """

    cutoff: float = 0.1
    text_first: bool = True
    redistribute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("cutoff")

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        """Measure distance from the smooth part [batch_size, 1, kv_len], and its share as mass."""
        key_distance, key_share = _deviate(key, prompt, self.cutoff)
        value_distance, value_share = _deviate(value, prompt, self.cutoff)
        return LayerScores(
            scores=(key_distance + value_distance)[:, None],
            prompt=prompt,
            mass=key_share + value_share,
        )

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Share the budget by high-frequency energy [num_layers, batch_size] int64."""
        lens = torch.stack([layer.prompt.lens for layer in layers])
        fraction = share_by_mass(self, layers, redistribute=self.redistribute).clamp(max=1.0)
        return keep_whole(self, layers, floor_share(lens, fraction).clamp(min=1))

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Put text before vision, and the sinks before all."""
        preferred = ~prompt.is_vision if self.text_first else None
        return self.force(prompt, budget, preferred=preferred)


def _deviate(states: Tensor, prompt: Prompt, cutoff: float) -> tuple[Tensor, Tensor]:
    """Compare keys or values with their smooth part.

    Args:
        states: [batch_size, num_kv_heads, kv_len, head_dim].
        prompt: which of them are real.
        cutoff: the fraction of coefficients that are smooth.

    Returns:
        The mean squared distance of every token [batch_size, kv_len] float32, and the share of the
        energy that is not smooth [batch_size] float32.
    """
    signal = states.transpose(1, 2).flatten(2).float()
    signal = signal.masked_fill(~prompt.valid[..., None], 0.0)
    num_smooth = floor_share(prompt.lens, cutoff)
    rough = signal.clone()
    stop = int(prompt.kv_len * cutoff + 1e-6)
    for first in range(0, stop, COEFFICIENTS_AT_ONCE):
        basis = _cosines(prompt, num_smooth, first, min(first + COEFFICIENTS_AT_ONCE, stop))
        rough -= basis.mT @ (basis @ signal)
    energy, distance = signal.square().mean(2), rough.square().mean(2)
    # What float32 cannot tell from 0 is 0, or constant keys would be ranked by rounding.
    mean_energy = energy.sum(1, keepdim=True) / prompt.lens[:, None].clamp(min=1)
    distance = distance.where(distance > 1e-9 * mean_energy, 0.0)
    return distance, distance.sum(1) / energy.sum(1).clamp(min=torch.finfo(torch.float32).tiny)


def _cosines(prompt: Prompt, num_smooth: Tensor, first: int, stop: int) -> Tensor:
    """Return rows of the orthonormal cosine basis of every sequence's real tokens.

    Args:
        prompt: the tokens.
        num_smooth: [batch_size] int64, rows from it on are 0.
        first: the first row.
        stop: the last row + 1.

    Returns:
        [batch_size, stop - first, kv_len] float32, 0 for padding.
    """
    frequency = torch.arange(first, stop, device=num_smooth.device)
    lens = prompt.lens.clamp(min=1)[:, None, None]
    # The angle in quarter turns of 1 / lens, reduced as an integer: exact for any frequency.
    turns = (2 * prompt.rank_from_start[:, None] + 1) * frequency[:, None] % (4 * lens)
    wave = (turns * (math.pi / 2) / lens).cos()
    size = torch.where(frequency == 0, 1.0, 2.0)[:, None] / lens
    inside = (frequency < num_smooth[:, None])[..., None] & prompt.valid[:, None]
    return (wave * size.sqrt()).masked_fill(~inside, 0.0)
