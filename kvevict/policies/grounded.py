"""Grounded: where the heads agree that the question looks; layers share by what is left to cover.

A method of this package, not of a paper: `bench/fidelity/README.md` says how it was chosen, and
where it is not the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.policies._lists import in_list
from kvevict.policies.base import LayerScores, Policy, Prompt, select_ranked
from kvevict.priority import FORCED, NEVER, PREFERRED


@dataclass(frozen=True)
class Grounded(Policy):
    r"""The best rows of the text after the vision choose, the more heads agree the better.

    Let $A_h[i,j]$ be the attention of query head h in a layer, t the text rows after the last
    vision token (all rows of a sequence that has none), n the budget of `keep` tokens per layer.

    - Score of a key: $s[j] = (mean_h \sqrt{\max_{i \in t} A_h[i,j]})^2$. The maximum lets one row
      that reads the region outweigh many that look elsewhere; the mean of roots lies between the
      geometric mean, which asks for all heads, and the plain one, which one head can carry. One
      list per layer, shared by its heads.
    - Text first, but in at most half of the budget, rounded up (in more where there is too little
      vision to fill the rest): the sinks and the last token, as far as they fit into that half,
      then what is not vision, best scores first. Text that does not get in goes.
    - The other vision keys of all layers are one pool. Key j of layer l is worth
      $s_l[j] \sqrt{1 - c_l[j]}$ where $c_l[j]$ is the part of the layer's scores in the pool that
      better keys hold; the most valuable keys of all layers stay, the earlier layer's among equals.
      So a layer that looks at few keys gets them early, and one that looks everywhere gets more as
      the others are covered.

    Exactly `num_layers * n` tokens of a fresh prompt stay. In later turns a layer that stores fewer
    than n keys brings only these.

    Scoring is one pass of O(num_qo_heads * num_rows * kv_len * head_dim) per layer, budgets sort
    num_layers * kv_len numbers once.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that stay in every layer, as far as half of the budget holds them
            beside the last token (1: behind `<bos>` an image may begin).
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.NONE
    statistic: ClassVar[Statistic] = Statistic.MAX

    num_sink: int = 1

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the text rows after the last vision token, all real ones where there are none."""
        return prompt.trailing_rows()

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
        """Score by the square of the mean root over heads [batch_size, 1, kv_len]."""
        layer = super().observe(
            query, key, value, prompt, row_index, sm_scale=sm_scale, softmax_lse=softmax_lse
        )
        return replace(layer, scores=layer.scores.sqrt().mean(1, keepdim=True).square())

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Give every layer its anchors and its part of the pool [num_layers, batch_size] int64."""
        found = [self._find_anchors(layer.prompt) for layer in layers]
        anchored = torch.stack([count for _, _, count in found], 1)
        tokens = torch.stack([self.keep_tokens(layer.prompt) for layer in layers], 1)
        pairs = zip(layers, found, strict=True)
        worth = [_worth(layer, ~is_anchor) for layer, (_, is_anchor, _) in pairs]
        layer_of = torch.cat(
            [torch.full(w.shape[1:], i, device=w.device) for i, w in enumerate(worth)]
        )
        best_first = torch.cat(worth, 1).argsort(dim=1, descending=True, stable=True)
        place = torch.arange(best_first.shape[1], device=best_first.device)
        taken = place < (tokens - anchored).sum(1, keepdim=True)
        from_pool = torch.zeros_like(tokens)
        from_pool.scatter_add_(1, layer_of[best_first], taken.long())
        return (anchored + from_pool).T

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the sinks and the last token that fit half of `keep`, in every layer alike."""
        return self.force(prompt, self._half(prompt), num_recent=1)

    def select(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Keep the best anchors, then the best of the other keys."""
        classes, is_anchor, count = self._find_anchors(layer.prompt)
        anchors, _ = select_ranked(layer.scores, classes.where(is_anchor, NEVER), count, k)
        stays = in_list(anchors[:, 0], layer.prompt.kv_len)
        classes = classes.where(~is_anchor, NEVER).masked_fill(stays, PREFERRED)
        return select_ranked(layer.scores, classes, budget, k)

    def _half(self, prompt: Prompt) -> Tensor:
        """Return half of `keep`, rounded up [batch_size] int64."""
        return (self.keep_tokens(prompt) + 1) // 2

    def _find_anchors(self, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
        """Return the classes of all keys, which are text or forced, and how many of these stay.

        Returns:
            [batch_size, kv_len] uint8 and bool, and [batch_size] int64.
        """
        tokens = self.keep_tokens(prompt)
        classes = self.priority(prompt, tokens)
        is_anchor = (prompt.valid & ~prompt.is_vision) | (classes == FORCED)
        num_anchors = is_anchor.sum(1)
        to_fill = tokens - (prompt.lens - num_anchors)
        return classes, is_anchor, num_anchors.minimum(self._half(prompt).maximum(to_fill))


def _worth(layer: LayerScores, in_pool: Tensor) -> Tensor:
    """Return what the layer's keys in the pool are worth, best first [batch_size, kv_len] float64.

    -1 beyond their number.
    """
    in_pool = in_pool & layer.prompt.valid
    scores = layer.scores[:, 0].where(in_pool, 0.0).nan_to_num(nan=0.0)
    scores = scores.sort(1, descending=True).values.double()
    total = scores.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    uncovered = 1 - (scores.cumsum(1) - scores) / total
    place = torch.arange(scores.shape[1], device=scores.device)
    beyond = place >= in_pool.sum(1, keepdim=True)
    return (scores * uncovered.clamp(min=0).sqrt()).masked_fill(beyond, -1.0)
