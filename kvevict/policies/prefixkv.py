"""PrefixKV: every layer keeps the same share of its attention (arXiv 2412.03409)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction
from kvevict.policies.base import LayerScores, Policy, Prompt


@dataclass(frozen=True)
class PrefixKV(Policy):
    r"""Layers get the sizes at which they all hold the same part of their attention.

    Score of a key: its attention from all rows, averaged over all heads; one list per layer. Sorted
    and summed, the scores of layer l rise as a curve $c_l$ from 0 to 1. For a share p the layer
    keeps the forced keys and as many others as $c_l$ has values below p; p is the largest for which
    the L layers keep at most L * `keep` tokens, forced ones included. (The paper finds p by
    bisection and scales the sizes to the budget; sorting all curves together finds it exactly.)

    This is the online form: p belongs to the sequence at hand. The released sizes are averages per
    model and ratio, computed beforehand, and are not shipped here.

    All rows vote, so scoring takes O(kv_len^2) time per layer (and O(kv_len) memory).

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that stay (4, as released).
        num_recent: last tokens that stay (1, as released).
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN

    num_recent: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("num_recent", minimum=0)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the sinks and the last tokens that fit `keep`, in every layer alike."""
        return self.force(prompt, self.keep_tokens(prompt), num_recent=self.num_recent)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return the sizes at the common share of attention [num_layers, batch_size] int64."""
        tokens = [self.keep_tokens(layer.prompt) for layer in layers]
        forced = [self.num_forced(layer.prompt) for layer in layers]
        curves = [_curve(*pair) for pair in zip(layers, forced, strict=True)]
        end = curves[0].new_full((len(curves[0]), 1), torch.inf)
        values = torch.cat([*curves, end], 1).sort(1).values
        num_free = torch.stack(tokens).sum(0) - torch.stack(forced).sum(0)
        sequence = torch.arange(len(values), device=values.device)
        share = values[sequence, num_free.clamp(max=values.shape[1] - 1)][:, None]
        sizes = [(curve < share).sum(1) + n for curve, n in zip(curves, forced, strict=True)]
        return torch.stack(sizes)


def _curve(layer: LayerScores, forced: Tensor) -> Tensor:
    """Return the sorted scores summed up to 1 [batch_size, kv_len] float64.

    Infinity from the entry on that the forced keys leave no place for.
    """
    mass = layer.scores[:, 0].where(layer.prompt.valid, 0.0).double()
    curve = mass.sort(1, descending=True).values.cumsum(1)
    curve = curve / curve[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    place = torch.arange(curve.shape[1], device=curve.device)
    return curve.masked_fill(place >= (layer.prompt.lens - forced)[:, None], torch.inf)
