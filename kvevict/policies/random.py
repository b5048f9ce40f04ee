"""Random eviction: what any method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvevict.policies.base import LayerScores, Policy, Prompt

_Word = TypeVar("_Word", int, Tensor)
_MASK = 2**32 - 1


@dataclass(frozen=True)
class Random(Policy):
    """Sinks and a random choice of the other tokens stay.

    The score of a key is a hash of the seed and of its place among the real tokens, and with
    `per_head` of layer and KV head too. So the choice is the same on every device, and does not
    depend on the batch, its padding or the tensors. The budget is `keep` tokens per layer and list,
    sinks included.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay.
        seed: another seed, another choice.
        per_head: each layer and KV head chooses for itself; otherwise one list serves all.
    """

    seed: int = 0
    per_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("seed", minimum=0)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        """Draw the scores of the first layer [batch_size, 1 | num_kv_heads, kv_len]."""
        num_lists = key.shape[1] if self.per_head else 1
        return LayerScores(scores=self._draw(prompt, num_lists, layer=0), prompt=prompt)

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Draw anew for every layer."""
        if not self.per_head:
            return layers
        return [
            replace(scored, scores=self._draw(scored.prompt, scored.scores.shape[1], layer))
            for layer, scored in enumerate(layers)
        ]

    def _draw(self, prompt: Prompt, num_lists: int, layer: int) -> Tensor:
        rank = prompt.rank_from_start[:, None]
        head = torch.arange(num_lists, device=rank.device)[:, None]
        word = _hash(_hash(_hash(_hash(self.seed) + layer) + head) + rank)
        # 24 bits are exact in float32; equal scores keep the earlier key.
        return (word >> 8).float()


def _hash(word: _Word) -> _Word:
    """Mix 32 bits (T. Wang's integer hash); no product leaves 63 bits."""
    word = word & _MASK
    word = ((word ^ (word >> 15)) * 0x2C1B3C6D) & _MASK
    word = ((word ^ (word >> 12)) * 0x297A2D39) & _MASK
    return word ^ (word >> 15)
