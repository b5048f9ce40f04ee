"""AdaKV: heads of a layer compete for its budget (arXiv 2407.11550)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies._lists import in_list
from kvevict.policies._shares import floor_share
from kvevict.policies.base import LayerScores, select_ranked
from kvevict.policies.snapkv import SnapKV
from kvevict.priority import PREFERRED


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV whose KV heads share one budget per layer: concentrated heads cede to spread ones.

    With k = `keep` tokens and H KV heads, the H k keys of the layer that score highest over all
    heads stay, above a floor per head. Sinks and window stay in every head and count inside k.

    - `floor_rule` "kvpress": every head is sure of its best floor * k keys (forced ones first); a
      layer keeps exactly H k.
    - "original": with n_h winners of head h without a floor, forced keys not counted, the head gets
      round((1 - floor) n_h + int(floor * (k - forced))) besides the forced ones. Truncation and
      rounding let a layer's total drift by up to about H tokens.

    Lists of a layer differ in length; an engine stores them in buckets (`kvevict.slots`).

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer and head on average (int).
        num_sink: first tokens that stay in every KV head (0 in the published form).
        window: as in SnapKV.
        pool_kernel: as in SnapKV.
        floor: the part of k that a head cannot lose (0.2).
        floor_rule: see above.
    """

    floor: float = 0.2
    floor_rule: Literal["kvpress", "original"] = "kvpress"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("floor")
        self._require_one_of("floor_rule", ("kvpress", "original"))

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return how many keys each head wins [num_layers, batch_size, num_kv_heads] int64."""
        return torch.stack([self._compete(layer) for layer in layers])

    def _compete(self, layer: LayerScores) -> Tensor:
        tokens, forced = self.keep_tokens(layer.prompt), self.num_forced(layer.prompt)
        priority = self.priority(layer.prompt, tokens)
        scores = self.ranking(layer, priority)
        classes = priority[:, None].expand_as(scores)
        if self.floor_rule == "kvpress":
            safe = _best_of_each(scores, priority, floor_share(tokens, self.floor))
            classes = classes.where(~safe, PREFERRED)
        winners = _count_winners(scores, classes, tokens)
        if self.floor_rule == "kvpress":
            return winners
        sure = floor_share(tokens - forced, self.floor)
        shared = (winners - forced[:, None]).double() * (1 - self.floor)
        return forced[:, None] + (shared + sure[:, None]).round().long()


def _best_of_each(scores: Tensor, priority: Tensor, count: Tensor) -> Tensor:
    """Mark the best `count` [batch_size] keys of every head [batch_size, num_heads, kv_len]."""
    kv_len = scores.shape[2]
    kept_indices, _ = select_ranked(scores, priority, count, kv_len)
    return in_list(kept_indices, kv_len)


def _count_winners(scores: Tensor, classes: Tensor, tokens: Tensor) -> Tensor:
    """Count, per head, the best num_heads * `tokens` [batch_size] keys of all heads together."""
    _, num_heads, kv_len = scores.shape
    row_k = (tokens * num_heads).to(torch.int32)[:, None]
    kept_indices, _ = ops.select_topk(
        scores.flatten(1)[:, None],
        num_heads * kv_len,
        row_k=row_k,
        priority=classes.flatten(1)[:, None].contiguous(),
    )
    last = num_heads * kv_len
    ascending = kept_indices[:, 0].where(kept_indices[:, 0] >= 0, last)
    ends = kv_len * torch.arange(1, num_heads + 1, device=scores.device, dtype=torch.int32)
    before = torch.searchsorted(ascending, ends.expand(len(ascending), -1).contiguous())
    return before.diff(dim=1, prepend=before.new_zeros(len(before), 1))
