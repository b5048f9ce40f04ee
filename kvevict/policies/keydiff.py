"""KeyDiff: keys that resemble the others go (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvevict import ops
from kvevict.policies.base import LayerScores, Policy, Prompt


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Attention-free: the keys least similar to the mean of all unit keys stay.

    Score of key j in KV head g: minus the cosine of j with the mean direction, on keys as cached
    (rotated). One list per KV head. The budget is `keep` tokens per layer and head, sinks included.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (0 in the published form).
    """

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        """Score the keys by how they differ [batch_size, num_kv_heads, kv_len]."""
        similarity, _redundancy = ops.key_diversity(key, key_mask=prompt.key_mask)
        return LayerScores(scores=-similarity, prompt=prompt)
