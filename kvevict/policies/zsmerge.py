"""ZSMerge: what leaves the cache goes into residual slots (arXiv 2503.10714)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import Metric
from kvevict.policies._lists import in_list, part_of
from kvevict.policies._shares import floor_share
from kvevict.policies._weighted import decayed, score_prompt
from kvevict.policies.base import LayerScores, Policy, Prompt, Selection, select_ranked
from kvevict.policies.decode import Victims, evictable, lowest
from kvevict.policies.limit import DecodeLimit, fitting, share_of, smaller
from kvevict.policies.merging import Merged, key_weights, match_victims, sum_groups, weigh_slots

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True)
class ZSMerge(DecodeLimit, Policy):
    r"""A few residual slots hold the means of all that is evicted, and count for as many tokens.

    Score of key j in KV head g: $S_j = \sum_i \gamma^{age(i)} A_{ij}$ over all rows i of the
    prompt, age 0 being the last one, averaged over the query heads of the group (the released code
    sums, which is the same ranking).

    A list of `keep` tokens holds the newest ones (the tail: `tail_share` of the budget, 2 at
    least), the sinks, `num_residual` residual slots and the keys of the highest scores. The keys
    that are left over are cut, in their order, into as many contiguous groups as there are
    residual slots, the first ones longer by one if need be; a residual slot holds the mean of
    a group's keys and that of its values, at the place of the group's first key. Rotated keys are
    averaged as they are.

    In attention a key that stands for w tokens has log(w) added to its logits.

    While decoding $S_j \leftarrow \gamma S_j + a_t[j]$, and a list stays at its budget: a key that
    leaves the tail takes the place of the lowest S, which first goes into the residual slot of the
    largest dot product, keys and values each as means by the number of tokens that they stand for.
    In a list of which nothing was evicted before, the keys of the lowest S are the residual slots.

    The budget is `keep` tokens per layer and KV head, all of these included. The tail and the
    residual slots take half of a small budget each, at most.

    All rows vote, so scoring a prompt takes O(kv_len^2) time per layer.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (0 in the published form).
        num_residual: residual slots.
        tail_share: the part of the budget that goes to the newest tokens (0.1).
        decay: $\gamma$ (0.98).
        decode: "evict", or "append" to leave the cache alone after the prompt.
    """

    num_residual: int = 1
    tail_share: float = 0.1
    decay: float = 0.98
    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("num_residual", minimum=1)
        self._require_fraction("tail_share")
        self._require_fraction("decay")
        self._require_one_of("decode", ("evict", "append"))

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return all real rows."""
        return prompt.rows_of(prompt.valid)

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
        """Score by decayed attention [batch_size, num_kv_heads, kv_len]."""
        rows = self.row_index(prompt) if row_index is None else row_index
        scores = score_prompt(
            query,
            key,
            prompt,
            rows,
            decayed(rows, self.decay),
            sm_scale=sm_scale,
            softmax_lse=softmax_lse,
        )
        return LayerScores(scores=scores, prompt=prompt)

    def select(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Keep the tail, the sinks, the best keys and the first of every group of the others."""
        kept, _, is_first = self._divide(layer, budget, k)
        row_k = budget[:, None].expand(-1, kept.shape[1]).int().contiguous()
        priority = (kept | is_first).byte()
        return ops.select_topk(torch.zeros_like(layer.scores), k, row_k=row_k, priority=priority)

    def merge(self, key: Tensor, value: Tensor, layer: LayerScores, selection: Selection) -> Merged:
        """Average the groups; residual slots get the score inf."""
        budget = selection.kept_lens[:, 0].long()
        _, is_left, is_first = self._divide(layer, budget, selection.kept_indices.shape[2])
        place = torch.arange(layer.prompt.kv_len, device=key.device).expand_as(is_left)
        first = place.where(is_first, -1).cummax(2).values
        goes = is_left & ~is_first
        sources, match = (index.where(goes, -1).int() for index in (place, first))
        weight = key_weights(layer)
        ops.merge_tokens_([key, value], sources, match, weight.contiguous())
        scores = layer.scores.masked_fill(is_first, torch.inf)
        weights = sum_groups(weight[..., None], sources, match)[..., 0]
        return Merged(LayerScores(scores=scores, prompt=layer.prompt), weights)

    # While decoding

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Set the limits; every list gets residual slots, which are those of the score inf."""
        super().begin_decoding(layers, scores)
        for slots in layers:
            weigh_slots(slots)
            limit = slots.memory["limit"]
            assert not isinstance(limit, float)
            num_residual, num_sink, num_recent = self._parts(limit)
            live = slots.columns >= 0
            # A short list may hold nothing but sinks and tail.
            classes = live.byte() + (live & (slots.positions >= self.num_sink)).byte()
            classes += evictable(slots, num_sink, num_recent).byte()
            has_none = ~(live & ~slots.scores.isfinite()).any(2)
            row_k = has_none.int() * num_residual
            lowest_slots, _ = ops.select_topk(
                -slots.scores, self.num_residual, row_k=row_k.int(), priority=classes
            )
            slots.scores.masked_fill_(in_list(lowest_slots, slots.stored), torch.inf)

    def choose_victims(
        self, slots: Slots, limit: int | Tensor, count: int | Tensor, most: int
    ) -> Victims | None:
        """Choose the lowest scores, and merge them into residual slots."""
        _, num_sink, num_recent = self._parts(limit)
        is_residual = (slots.columns >= 0) & ~slots.scores.isfinite()
        candidates = evictable(slots, num_sink, num_recent) & ~is_residual
        victims = lowest(slots.scores, candidates.byte(), count, most)
        weight = slots.key_weight
        assert weight is not None
        if victims is not None:
            targets, _ = ops.select_topk(
                torch.zeros_like(weight), self.num_residual, priority=is_residual.byte()
            )
            sources, match, _ = match_victims(slots, victims, targets, metric=Metric.DOT)
            ops.merge_tokens_([slots.keys, slots.values], sources, match, weight.contiguous())
            weight.copy_(sum_groups(weight[..., None], sources, match)[..., 0])
        return victims

    def _parts(self, limit: int | Tensor) -> tuple[int | Tensor, int | Tensor, int | Tensor]:
        """Return residual slots, sinks, and newest keys that do not compete, of a list's limit.

        The key that has just left the tail is among these, if any other one is left.
        """
        num_residual = fitting(self.num_residual, limit // 2)
        for_itself = limit - num_residual
        tail = share_of(limit, self.tail_share)
        tail = max(tail, 2) if isinstance(tail, int) else tail.clamp(min=2)
        tail = smaller(tail, (for_itself + 1) // 2)
        num_sink = fitting(self.num_sink, for_itself - tail)
        return num_residual, num_sink, smaller(tail + 1, for_itself - num_sink)

    def _divide(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks of the keys [batch_size, num_lists, kv_len] bool.

        Which stay for themselves; which are left over; and which of these is the first of a group.
        """
        prompt = layer.prompt
        is_over = budget < prompt.lens
        num_residual = (budget // 2).clamp(max=self.num_residual).where(is_over, 0)
        for_itself = budget - num_residual
        num_tail = floor_share(budget, self.tail_share).clamp(min=2)
        priority = self.force(prompt, for_itself, num_recent=num_tail)
        kept_indices, _ = select_ranked(layer.scores, priority, for_itself, k)
        kept = in_list(kept_indices, prompt.kv_len)
        is_left = prompt.valid[:, None] & ~kept & (num_residual > 0)[:, None, None]
        count, num_groups = is_left.sum(2, keepdim=True), num_residual.clamp(min=1)[:, None, None]
        rank = is_left.cumsum(2) - 1
        group = part_of(rank, count, num_groups)
        begin = group * (count // num_groups) + torch.minimum(group, count % num_groups)
        return kept, is_left, is_left & (rank == begin)
