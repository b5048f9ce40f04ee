"""PyramidKV: lower layers get more of the budget than higher ones (arXiv 2406.02069)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvevict.policies.base import LayerScores
from kvevict.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly with depth.

    Let base be the tokens to share out per layer. The last of L layers gets low = base / beta, the
    first high = 2 base - low, layer l gets high - l (high - low) / (L - 1). Where high exceeds what
    the first layer can use (N without the forced keys), it is cut to that and low is raised.

    Two accountings are in use, and both keep L * `keep` tokens in all here, forced keys included:

    - "original": base counts the tokens besides the forced ones (sinks and window), which every
      layer keeps on top. The released code floors the step between layers, which leaves up to
      (L - 1) / 2 tokens per layer above its budget; the step is exact here.
    - "kvpress": base counts the forced ones too; the layers share evenly where the pyramid would
      not leave room for them.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that stay in every KV head (0 in the published form).
        window: as in SnapKV.
        pool_kernel: as in SnapKV.
        beta: how many times the last layer's share is below the mean (20).
        accounting: see above.
    """

    beta: int = 20
    accounting: Literal["original", "kvpress"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("beta", minimum=1)
        self._require_one_of("accounting", ("original", "kvpress"))

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return the pyramid [num_layers, batch_size] int64."""
        lens = torch.stack([layer.prompt.lens for layer in layers]).double()
        tokens = torch.stack([self.keep_tokens(layer.prompt) for layer in layers]).double()
        forced = torch.stack([self.num_forced(layer.prompt) for layer in layers]).double()
        apart = forced if self.accounting == "original" else torch.zeros_like(forced)
        base = tokens - apart
        high = torch.minimum(2 * base - base / self.beta, lens - forced)
        low = 2 * base - high
        depth = torch.linspace(0, 1, len(layers), dtype=torch.float64, device=lens.device)
        if len(layers) == 1:
            depth = depth + 0.5
        pyramid = (high - depth[:, None] * (high - low)).round() + apart
        fits = (high >= low) & (low + apart >= forced)
        return pyramid.where(fits, tokens).long()
