"""KeepKV: merging that leaves the output of attention unchanged (arXiv 2504.09936)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies._lists import at
from kvevict.policies._weighted import decayed, score_prompt
from kvevict.policies.base import LayerScores, Policy, Prompt, Selection
from kvevict.policies.decode import Victims, evictable, lowest
from kvevict.policies.limit import DecodeLimit, fitting, smaller
from kvevict.policies.merging import (
    Merged,
    key_weights,
    match_evicted,
    match_victims,
    others_than,
    sum_groups,
    weigh_slots,
)

if TYPE_CHECKING:
    from kvevict.slots import Slots

MOST_STRETCH = 2.0
"""How many times longer or shorter than the mean of its keys a merged key may be."""


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryScores(LayerScores):
    """Scores beside the query that they are expected to meet next.

    Attributes:
        query: [batch_size, num_kv_heads, head_dim] float32, times the scale of the logits.
    """

    query: Tensor


@dataclass(frozen=True)
class KeepKV(DecodeLimit, Policy):
    r"""Evicted keys are merged such that the next query, if it is as expected, sees no difference.

    Every key has votes $p_j$, 1 at first; attention is proportional to $p_j e^{s_j}$, with $s_j$
    the logit. Where the keys M (a kept one, and those evicted ones that resemble it most and at
    least by `similarity`, a cosine) are merged, with $E_j = e^{s_j}$,

    $p = \sum p_j$, $v = \sum p_j E_j v_j / \sum p_j E_j$, $k = \lambda \sum p_j E_j k_j$,
    $\lambda = \ln(\sum p_j E_j / \sum p_j) / \sum p_j E_j s_j$,

    which leaves the output for the query of $s_j$ exactly as it was. Other evicted keys are gone.

    What the paper's abstract and the formulas at hand leave open was decided here:

    - the query: $s_j$ is the average of the logits over the last `window` rows, a row's part
      falling by `decay` with its age, and over the query heads of a group. It is the logit of an
      average query, so for that one the merge is exact; with one row and a group of one, for the
      last query itself;
    - the score that evicts: the attention from the same rows with the same parts. They and the
      sinks stay;
    - where $\lambda$ would make k more than twice as long as the weighted mean of the keys, or
      less than half, or turn it (as $\sum p_j E_j s_j$ is near 0), k is that mean, and p is what
      makes the output right: $\sum p_j E_j / e^s$, with s the logit of k.

    While decoding, both averages go on, step by step, and a list stays at its budget: the lowest
    score that is neither sink nor in the window is merged, or gone, in the same way.

    The budget is `keep` tokens per layer and KV head, sinks and window included; of a budget below
    twice the window, its newest half. One list per KV head. Keys are merged as cached (rotated).

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay.
        window: rows that vote, and newest keys that stay.
        decay: how much less a row counts than the next one.
        similarity: the least cosine of two keys that are merged; -1 merges all.
        decode: "evict", or "append" to leave the cache alone after the prompt.
    """

    window: int = 32
    decay: float = 0.9
    similarity: float = 0.8
    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("window", minimum=1)
        self._require_fraction("decay")
        self._require_one_of("decode", ("evict", "append"))
        is_number = isinstance(self.similarity, Real) and not isinstance(self.similarity, bool)
        if not is_number or not -1 <= self.similarity <= 1:
            raise ValueError(f"KeepKV: similarity must be in [-1, 1], got {self.similarity!r}")

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the last `window` real rows of every sequence."""
        return prompt.last_rows(self.window)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        *,
        sm_scale: float | None = None,
        softmax_lse: Tensor | None = None,
    ) -> QueryScores:
        """Score by decayed attention [batch_size, num_kv_heads, kv_len], and average the rows."""
        rows = self.row_index(prompt) if row_index is None else row_index
        row_weight = decayed(rows, self.decay)
        scores = score_prompt(
            query, key, prompt, rows, row_weight, sm_scale=sm_scale, softmax_lse=softmax_lse
        )
        sequence = torch.arange(len(rows), device=rows.device)[:, None]
        states = query.transpose(1, 2)[sequence, rows.long()].float()
        states = states.masked_fill((rows < 0)[..., None, None], 0)
        part = row_weight / row_weight.sum(1, keepdim=True).clamp(min=1)
        group_size = query.shape[1] // key.shape[1]
        per_head = (states * part[..., None, None]).sum(1)
        mean = per_head.view(len(rows), key.shape[1], group_size, key.shape[3]).mean(2)
        scale = query.shape[3] ** -0.5 if sm_scale is None else sm_scale
        return QueryScores(scores=scores, prompt=prompt, query=mean * scale)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the window and the sinks that fit."""
        return self.force(prompt, budget, num_recent=self.window)

    def merge(self, key: Tensor, value: Tensor, layer: LayerScores, selection: Selection) -> Merged:
        """Merge what resembles a kept key; see `MergingPolicy`."""
        assert isinstance(layer, QueryScores)
        sources, match, similarity = match_evicted(key, selection, layer.prompt)
        match = match.where(similarity >= self.similarity, -1)
        votes = merge_exactly(key, value, key_weights(layer), layer.query, sources, match)
        return Merged(layer, votes)

    # While decoding

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Set the limits, and remember the average queries."""
        super().begin_decoding(layers, scores)
        for slots, layer in zip(layers, scores, strict=True):
            assert isinstance(layer, QueryScores)
            slots.memory["query"] = layer.query.view(*slots.keys.shape[:2], -1)
            weigh_slots(slots)

    def observe_step(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """Let the averages go on."""
        super().observe_step(slots, query, key_mask=key_mask, sm_scale=sm_scale)
        batch_size, num_kv_heads = slots.keys.shape[:2]
        num_qo_heads, qo_len, head_dim = query.shape[1:]
        scale = head_dim**-0.5 if sm_scale is None else sm_scale
        shape = (batch_size, num_kv_heads, num_qo_heads // num_kv_heads, qo_len, head_dim)
        rows = query.float().reshape(shape).mean(2)
        votes = torch.ones_like(rows[..., 0]) if key_mask is None else key_mask[..., -qo_len:]
        later = votes.flip(-1).cumsum(-1).flip(-1) - votes.long()
        part = (1 - self.decay) * self.decay ** later.float() * votes
        mean = slots.memory["query"]
        assert isinstance(mean, Tensor)
        mean = mean * self.decay ** votes.sum(-1, keepdim=True).float()
        slots.memory["query"] = mean + (rows * part[..., None]).sum(2) * scale

    def choose_victims(
        self, slots: Slots, limit: int | Tensor, count: int | Tensor, most: int
    ) -> Victims | None:
        """Choose the lowest scores that are neither sinks nor in the window, and merge them."""
        num_recent = smaller(self.window, (limit + 1) // 2)
        candidates = evictable(slots, fitting(self.num_sink, limit - num_recent), num_recent)
        victims = lowest(slots.scores, candidates.byte(), count, most)
        votes, query = slots.key_weight, slots.memory["query"]
        assert votes is not None
        assert isinstance(query, Tensor)
        if victims is not None:
            sources, match, similarity = match_victims(slots, victims, others_than(slots, victims))
            match = match.where(similarity >= self.similarity, -1)
            votes.copy_(merge_exactly(slots.keys, slots.values, votes, query, sources, match))
        return victims


def merge_exactly(
    key: Tensor,
    value: Tensor,
    votes: Tensor,
    query: Tensor,
    source_index: Tensor,
    match_index: Tensor,
) -> Tensor:
    """Merge keys and values in place, without a change for one query; see `KeepKV`.

    Args:
        key: [batch_size, num_kv_heads, kv_len, head_dim]. Written.
        value: like key. Written.
        votes: [batch_size, num_kv_heads, kv_len] float32.
        query: [batch_size, num_kv_heads, head_dim] float32, times the scale of the logits.
        source_index: [batch_size, 1 | num_kv_heads, kv_len] int32; a source is in its own place.
        match_index: [batch_size, num_kv_heads, kv_len] int32.

    Returns:
        The votes of the merged keys, like votes.
    """
    logits = (key.float() @ query[..., None])[..., 0]
    is_source = match_index >= 0
    place = torch.arange(key.shape[2], device=key.device).expand_as(match_index)
    target = match_index.long().where(is_source, place)
    most = torch.full_like(logits, -torch.inf).scatter_reduce_(2, target, logits, "amax")
    # E over that of the group's largest logit, which the formulas below account for.
    below = logits - at(most, target)
    part = votes * below.exp()
    terms = torch.stack([part, votes, part * below, is_source.float()], -1)
    sums = sum_groups(terms, source_index, match_index)
    total, num_votes, moment, num_sources = sums.unbind(-1)
    wanted, mean = most + (total / num_votes).log(), most + moment / total
    stretch = wanted / mean
    is_safe = (stretch >= 1 / MOST_STRETCH) & (stretch <= MOST_STRETCH)
    # Finite, also where nothing is merged.
    share = (part / at(total, target)).nan_to_num(0.0, 0.0, 0.0)
    longer = share * at(stretch.where(is_safe, 1.0), target)
    ops.merge_tokens_([key], source_index, match_index, longer, normalize=False)
    ops.merge_tokens_([value], source_index, match_index, share, normalize=False)
    new_votes = num_votes.where(is_safe, num_votes * (wanted - mean).exp())
    return new_votes.where((num_sources > 0) & ~is_source, votes)
