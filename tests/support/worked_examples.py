"""Attention given by its probabilities, and HAE's dual-attention pruning (arXiv 2602.02197)."""

from __future__ import annotations

import torch
from torch import Tensor

# Two heads, the rows of the last two of eight tokens; tokens 1 to 5 are vision.
HAE_ATTENTION = torch.tensor(
    [
        [
            [0.50, 0.02, 0.10, 0.01, 0.05, 0.12, 0.20, 0],
            [0.40, 0.01, 0.02, 0.03, 0.06, 0.08, 0.20, 0.20],
        ],
        [
            [0.46, 0.04, 0.10, 0.01, 0.15, 0.04, 0.20, 0],
            [0.36, 0.03, 0.02, 0.01, 0.04, 0.14, 0.20, 0.20],
        ],
    ],
    dtype=torch.float64,
)
HAE_CANDIDATES = torch.tensor([[False, True, True, True, True, True, False, False]])
# ratio, alpha, max_evicted and what is kept.
HAE_DECISIONS = (
    (0.15, 0.05, None, [0, 2, 4, 5, 6, 7]),
    (0.30, 0.20, None, [0, 5, 6, 7]),
    (0.15, 0.0199, None, [0, 1, 2, 3, 4, 5, 6, 7]),
    (0.30, 0.20, 1, [0, 1, 2, 4, 5, 6, 7]),
)


def query_of_heads(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key, at sm_scale 1, whose attention is `attention` [num_heads, rows, keys].

    The heads share one KV head.
    """
    key = torch.eye(attention.shape[-1], dtype=attention.dtype)
    return attention.log().clamp(min=-100)[None], key.expand(1, 1, -1, -1)
