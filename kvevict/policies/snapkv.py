"""SnapKV: the last rows of the prompt choose what each KV head keeps (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.priority import ORDINARY


@dataclass(frozen=True)
class SnapKV(Policy):
    """An observation window at the end of the prompt votes for the keys before it.

    Score of key j in KV head g: the attention that j gets from the last `window` rows, summed over
    rows, averaged over the query heads of the group, then averaged over `pool_kernel` neighbors.
    (The published form takes the mean over rows, which is the same ranking.) Sinks and the window
    itself count as zero neighbors and are kept without competing. One list per KV head.

    The budget is `floor(keep * N)` tokens per layer and head, window and sinks included, as in
    kvpress; KVCache-Factory counts the same, the original adds the window on top.

    A budget below twice the window protects only its newest half of tokens, so that something is
    left to choose: published settings start at twice the window. All `window` rows still vote.

    The modality is not looked at: image, video and text keys compete with each other.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay in every KV head (0 in the published form, which on small
            vision-language models can drop the first token and lose an otherwise right choice).
        window: rows that vote, and newest keys that stay (32; kvpress uses 64).
        pool_kernel: odd width of the average pool over keys (5), zero padding counted; 1 = none.
    """

    window: int = 32
    pool_kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("window", minimum=1)
        self._require_count("pool_kernel", minimum=1)
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"SnapKV: pool_kernel must be odd, got {self.pool_kernel}")

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the last `window` real rows of every sequence."""
        return prompt.last_rows(self.window)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the window and the sinks that fit `keep`, in every layer and head alike."""
        return self.force(prompt, self.keep_tokens(prompt), num_recent=self.window)

    def ranking(self, layer: LayerScores, priority: Tensor) -> Tensor:
        """Pool the scores of ordinary keys, exactly as `kvevict.score_and_compact` does."""
        return pool_scores(layer.scores, priority, self.pool_kernel)


def pool_scores(scores: Tensor, priority: Tensor, pool_kernel: int) -> Tensor:
    """Average the scores of ordinary keys over `pool_kernel` neighbors.

    Keys of another class count as zero neighbors and keep their own score. The sum runs from left
    to right, so the result equals that of the fused op bit for bit.

    Args:
        scores: [batch_size, num_heads, kv_len] float32.
        priority: [batch_size, kv_len] uint8.
        pool_kernel: odd.
    """
    if pool_kernel == 1:
        return scores
    ordinary = (priority == ORDINARY)[:, None]
    half = pool_kernel // 2
    padded = torch.nn.functional.pad(scores.where(ordinary, 0.0), (half, half))
    total = padded[..., : scores.shape[-1]]
    for offset in range(1, pool_kernel):
        total = total + padded[..., offset : offset + scores.shape[-1]]
    return (total / pool_kernel).where(ordinary, scores)
