"""MixKV: importance and diversity, mixed by how redundant a head is (arXiv 2510.20707)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import DiversityReference, HeadReduction
from kvevict.policies.base import LayerScores, Prompt, select_ranked
from kvevict.policies.snapkv import SnapKV


@dataclass(frozen=True, eq=False, kw_only=True)
class MixedScores(LayerScores):
    """The host's scores and what they are mixed with.

    Attributes:
        similarity: [batch_size, num_kv_heads, kv_len] float32, mean cosine with all keys.
        redundancy: [batch_size, num_kv_heads] float32, mean cosine of two different keys.
        value_norm: [batch_size, num_kv_heads, kv_len] float32.
    """

    similarity: Tensor
    redundancy: Tensor
    value_norm: Tensor


@dataclass(frozen=True)
class MixKV:
    r"""Another method's budgets, but tokens chosen by a mixture of importance and diversity.

    The host's attention scores a (pooled, of the keys before its window) become, per KV head:

    - importance $a + v$, with $v$ the norm of the value;
    - diversity $d$, minus the similarity of the key to all others;
    - $r d + (1 - r)(a + v)$, with the redundancy r of the head's keys, computed for the sequence at
      hand as in the paper. (The released code computes r and then reads it from a table of another
      model.)

    v and d are brought to the range [0, 1] and to the mean of a first. Budgets, forced tokens and
    their accounting are the host's; of AdaKV and PyramidKV they depend on attention alone.

    Attributes:
        host: a `SnapKV`, `PyramidKV` or `AdaKV`, with `keep` and all other fields.
        diversity_reference: scale d to the mean of a (as in the released code) or of a + v.

    Raises:
        ValueError: if the host is another method.
    """

    host: SnapKV
    diversity_reference: DiversityReference = DiversityReference.ATTENTION

    def __post_init__(self) -> None:
        per_head = HeadReduction.GROUP_MEAN
        if not isinstance(self.host, SnapKV) or self.host.head_reduction != per_head:
            raise ValueError(
                f"MixKV: host must be SnapKV, PyramidKV or AdaKV, with a list per KV head, "
                f"got {self.host!r}"
            )

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the host's rows."""
        return self.host.row_index(prompt)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **options: Any,
    ) -> MixedScores:
        """Add similarity, redundancy and value norms to the host's scores."""
        layer = self.host.observe(query, key, value, prompt, row_index, **options)
        similarity, redundancy = ops.key_diversity(key, key_mask=prompt.key_mask)
        return MixedScores(
            **vars(layer),
            similarity=similarity,
            redundancy=redundancy,
            value_norm=torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32),
        )

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Let the host revise them."""
        return self.host.revise(layers)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return the host's budgets."""
        return self.host.budgets(layers)

    def select(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Mix the host's ranking, then keep the best; see `PrefillPolicy.select`."""
        assert isinstance(layer, MixedScores)
        priority = self.host.priority(layer.prompt, budget)
        mixed = ops.mix_scores(
            self.host.ranking(layer, priority),
            layer.similarity,
            layer.value_norm,
            layer.redundancy,
            priority=priority,
            diversity_reference=self.diversity_reference,
        )
        return select_ranked(mixed, priority, budget, k)
