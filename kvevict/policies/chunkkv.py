"""ChunkKV: chunks of neighboring tokens stay or go together (arXiv 2502.00299)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction
from kvevict.policies.base import LayerScores
from kvevict.policies.snapkv import SnapKV
from kvevict.priority import ORDINARY


@dataclass(frozen=True)
class ChunkKV(SnapKV):
    """SnapKV's scores, averaged over chunks of `chunk_len` tokens and over all heads.

    The tokens of a sequence are cut into chunks from its first on; the best chunks stay whole, one
    list for all heads. Sinks and window stay without competing, and the chunks that they cut are
    judged by the rest of their tokens, as is a last, shorter one. The budget is `keep` tokens per
    layer, forced ones included: of the last chunk that fits only in part, the first tokens stay
    (published: whole chunks only, so up to `chunk_len` fewer tokens).

    The published form reuses a layer's list on the next layers; known second-hand, hence off by
    default.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (0 in the published form).
        window: as in SnapKV.
        pool_kernel: as in SnapKV.
        chunk_len: tokens per chunk (10; kvpress uses 20).
        num_reuse: how many layers in a row share the list of the first of them (1 = none). They
            are scored nonetheless. In a later turn, where they hold different tokens, each decides
            for itself.
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN

    chunk_len: int = 10
    num_reuse: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("chunk_len", minimum=1)
        self._require_count("num_reuse", minimum=1)

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Take the scores of the first layer of each run of `num_reuse`."""
        leaders = [layers[i - i % self.num_reuse] for i in range(len(layers))]
        return [
            replace(layer, scores=leader.scores) if layer.prompt is leader.prompt else layer
            for layer, leader in zip(layers, leaders, strict=True)
        ]

    def ranking(self, layer: LayerScores, priority: Tensor) -> Tensor:
        """Pool, then give every token the mean of the ordinary tokens of its chunk."""
        pooled = super().ranking(layer, priority)[:, 0]
        prompt = layer.prompt
        sequence = torch.arange(len(pooled), device=pooled.device)[:, None]
        # Real keys first, in order, so that chunks are consecutive whatever the padding.
        slots = (~prompt.valid).byte().argsort(dim=1, stable=True)
        ordinary = (priority == ORDINARY)[sequence, slots]
        means = _average_chunks(pooled[sequence, slots], ordinary, self.chunk_len)
        return means[sequence, prompt.rank_from_start // self.chunk_len][:, None]


def _average_chunks(scores: Tensor, ordinary: Tensor, chunk_len: int) -> Tensor:
    """Return the means of chunks [batch_size, num_chunks], summed from left to right.

    Args:
        scores: [batch_size, kv_len] float32.
        ordinary: [batch_size, kv_len] bool, the tokens that count.
        chunk_len: tokens per chunk.
    """
    missing = -scores.shape[1] % chunk_len
    chunks, counted = (
        torch.nn.functional.pad(t, (0, missing)).view(len(scores), -1, chunk_len)
        for t in (scores.where(ordinary, 0.0), ordinary.float())
    )
    total, count = chunks[..., 0], counted[..., 0]
    for i in range(1, chunk_len):
        total, count = total + chunks[..., i], count + counted[..., i]
    return total / count.clamp(min=1)
