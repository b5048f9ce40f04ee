"""D2O: layers of even attention keep more; what resembles a kept key is merged (2406.13035)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction
from kvevict.policies._shares import fill, floor_share, keep_whole
from kvevict.policies.base import LayerScores, Policy, Prompt, Selection
from kvevict.policies.decode import Victims, evictable, lowest
from kvevict.policies.limit import DecodeLimit, fitting, share_of, smaller
from kvevict.policies.merging import (
    Merged,
    match_evicted,
    match_victims,
    merge_by_similarity,
    others_than,
)

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True, eq=False, kw_only=True)
class ThresholdScores(LayerScores):
    """Scores beside the similarity from which on keys were merged.

    Attributes:
        threshold: [batch_size, num_kv_heads] float32.
    """

    threshold: Tensor


@dataclass(frozen=True)
class D2O(DecodeLimit, Policy):
    r"""Attention summed over all rows decides; evicted keys like a kept one are merged into it.

    Score $S_j$ of key j in KV head g: the attention that j got from every row of the prompt,
    averaged over the query heads of the group. One list per KV head. (The released code keeps a
    list per query head of repeated keys.)

    - Layers 0, 1 and the last stay whole. In any other layer l, $v_l$ is the variance of $S_j$ over
      the keys, of every query head, brought to [0, 1] over the heads and averaged over them; its
      part of the budget is $e^{-v_l} / \sum e^{-v}$.
    - A layer keeps the newest keys (`recent_share` of its budget), the sinks, and the highest S.
    - Each evicted key e has its most similar kept key c (cosine $m_e$). It is merged if $m_e$ is at
      least the mean of m over all evicted keys of its list, else it is gone. (The released code
      decides for all heads at once, by the mean of m over the keys that happen to be at the same
      place in their lists.) Keys and values alike become, of n merged into c,

      - "released": $(c + \sum_e m_e e) / (n + 1)$, as the released code has it;
      - "exponential": $(\mathrm{e}\,c + \sum_e \mathrm{e}^{m_e} e) / (\mathrm{e} + \sum_e
        \mathrm{e}^{m_e})$, the weights of the paper (second-hand).

    While decoding every step adds its attention to S, and a list stays as long as it is (those of
    the whole layers, too; as published they grow): the lowest S that is neither sink nor recent is
    merged if its m is at least the threshold, else it is gone. The threshold is the mean m above
    after the prompt, and half itself, half the m at hand in every step.

    The layers together keep L times `keep` tokens: the whole layers, too, are paid for, by the
    others (as published they come on top). Where they cost more than half of all that, they get
    half of it and are evicted like the others; a model of three layers has no others, and all get
    `keep` tokens. What a layer cannot use goes to the others, in proportion.

    Keys are merged as cached (rotated), and count as one token in attention, as published. All rows
    vote, so scoring takes O(kv_len^2) time per layer.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that stay (4, as published).
        recent_share: the part of a layer's budget that goes to the newest tokens (a quarter; at
            most half).
        merging: see above.
        decode: "evict", or "append" to leave the cache alone after the prompt.
    """

    recent_share: float = 0.25
    merging: Literal["released", "exponential"] = "released"
    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("recent_share")
        self._require_one_of("merging", ("released", "exponential"))
        self._require_one_of("decode", ("evict", "append"))

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
    ) -> LayerScores:
        """Score the keys [batch_size, num_kv_heads, kv_len] and measure how uneven a layer is."""
        sums = ops.score_keys(
            query,
            key,
            row_index=row_index,
            softmax_lse=softmax_lse,
            key_mask=prompt.key_mask,
            sm_scale=sm_scale,
            head_reduction=HeadReduction.NONE,
        )
        group_size = query.shape[1] // key.shape[1]
        scores = sums.view(len(sums), key.shape[1], group_size, key.shape[2]).mean(2)
        return LayerScores(scores=scores, prompt=prompt, mass=_unevenness(sums, prompt))

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Share the budget [num_layers, batch_size] int64."""
        tokens = torch.stack([self.keep_tokens(layer.prompt) for layer in layers])
        whole = sorted({0, 1, len(layers) - 1} & {*range(len(layers))})
        others = [i for i in range(len(layers)) if i not in whole]
        if others:
            total = tokens.sum(0)
            lens = torch.stack([layer.prompt.lens for layer in layers])
            of_whole = (total // 2 // len(whole)).clamp(min=1)
            tokens[whole] = lens[whole].minimum(of_whole)
            rest = (total - tokens[whole].sum(0)).double()
            mass = torch.stack([mass for i in others if (mass := layers[i].mass) is not None])
            share = (-mass.double()).softmax(0)
            fraction = fill(rest * share / lens[others].clamp(min=1), share).clamp(max=1)
            tokens[others] = floor_share(lens[others], fraction).clamp(min=1)
        return keep_whole(self, layers, tokens)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the newest part of the layer's budget, and the sinks."""
        return self.force(prompt, budget, num_recent=floor_share(budget, self.recent_share))

    def merge(self, key: Tensor, value: Tensor, layer: LayerScores, selection: Selection) -> Merged:
        """Merge what resembles a kept key; see `MergingPolicy`."""
        sources, match, similarity = match_evicted(key, selection, layer.prompt)
        is_matched = match >= 0
        threshold = _mean_of(similarity, is_matched)
        match = match.where(similarity >= threshold[..., None], -1)
        self.merge_similar(key, value, sources, match, similarity)
        return Merged(ThresholdScores(**vars(layer), threshold=threshold.float()))

    def merge_similar(
        self, key: Tensor, value: Tensor, sources: Tensor, match: Tensor, similarity: Tensor
    ) -> None:
        """Merge keys and values in place.

        Args:
            key: [batch_size, num_kv_heads, kv_len, head_dim].
            value: like key.
            sources: [batch_size, 1 | num_kv_heads, kv_len] int32; a source is in its own place.
            match: [batch_size, num_kv_heads, kv_len] int32, their targets, -1 = none.
            similarity: like match float32.
        """
        if self.merging == "released":
            merge_by_similarity([key, value], sources, match, similarity)
        else:
            weight = similarity.where(match >= 0, 1.0).exp()
            ops.merge_tokens_([key, value], sources, match, weight)

    # While decoding

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Set the limits, and remember the thresholds."""
        super().begin_decoding(layers, scores)
        for slots, layer in zip(layers, scores, strict=True):
            threshold = torch.full_like(slots.scores[..., 0], torch.nan)
            if isinstance(layer, ThresholdScores):
                threshold = layer.threshold.view_as(threshold)
            slots.memory["threshold"] = threshold

    def limits(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> list[Tensor]:
        """Return what is left, or `keep` where nothing was evicted: layers differ otherwise."""
        limits = super().limits(layers, scores)
        if isinstance(self.keep, Integral):
            for i, (slots, layer) in enumerate(zip(layers, scores, strict=True)):
                was_cut = layer.prompt.totals.view(len(limits[i]), -1) > self.keep
                limits[i] = slots.lens.where(was_cut, limits[i])
        return limits

    def choose_victims(
        self, slots: Slots, limit: int | Tensor, count: int | Tensor, most: int
    ) -> Victims | None:
        """Choose the lowest scores that are neither sinks nor recent, and merge them or not."""
        num_recent = smaller(share_of(limit, self.recent_share), (limit + 1) // 2)
        candidates = evictable(slots, fitting(self.num_sink, limit - num_recent), num_recent)
        victims = lowest(slots.scores, candidates.byte(), count, most)
        old = slots.memory["threshold"]
        assert isinstance(old, Tensor)
        if victims is not None:
            sources, match, similarity = match_victims(slots, victims, others_than(slots, victims))
            mean = _mean_of(similarity, match >= 0)
            new = mean.where(old.isnan(), 0.5 * old.double() + 0.5 * mean)
            match = match.where(similarity >= new[..., None], -1)
            self.merge_similar(slots.keys, slots.values, sources, match, similarity)
            slots.memory["threshold"] = new.float().where(~mean.isnan(), old)
        return victims


def _mean_of(similarity: Tensor, is_matched: Tensor) -> Tensor:
    """Return the mean over matched keys [batch_size, num_kv_heads] float64, NaN where none is.

    Exact where all are equal: sums of equal floats are exact in float64.
    """
    return similarity.double().where(is_matched, 0.0).sum(2) / is_matched.sum(2)


def _unevenness(sums: Tensor, prompt: Prompt) -> Tensor:
    """Return the variance over keys, brought to [0, 1] over heads, and averaged [batch_size].

    Args:
        sums: [batch_size, num_qo_heads, kv_len] float32.
        prompt: what the keys are.
    """
    valid, count = prompt.valid[:, None], prompt.lens[:, None].clamp(min=1)
    mean = sums.where(valid, 0.0).sum(2) / count
    square = (sums - mean[..., None]).where(valid, 0.0).square().sum(2)
    variance = square / (count - 1).clamp(min=1)
    low, high = variance.aminmax(dim=1, keepdim=True)
    return ((variance - low) / (high - low + 1e-6)).mean(1)
