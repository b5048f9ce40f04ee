"""LOOK-M: text first, and evicted keys merged into similar kept ones (arXiv 2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies._shares import floor_share
from kvevict.policies.base import LayerScores, Policy, Prompt, Selection
from kvevict.policies.merging import Merged, match_evicted, merge_by_similarity, sum_groups


@dataclass(frozen=True)
class LookM(Policy):
    r"""Text outranks vision; what is evicted is merged into its most similar kept key.

    Score of key j in KV head g: the attention that j got from every row of the prompt, summed over
    rows, averaged over the query heads of the group. The newest keys and the sinks stay, then all
    text, then the vision keys of the highest scores. One list per KV head. (The released code keeps
    a list per query head of repeated keys.)

    Every evicted key e has a target c(e), the kept key of the largest cosine. With n keys merged
    into c, keys and values alike become

    - "pivot": the mean of c and of the n midpoints $(e + c) / 2$, as the released code has it;
    - "average": the mean of c and all e;
    - "weighted": $(c + \sum_e \cos(e, c) e) / (n + 1)$.

    Merged keys count as one token each in attention, as published, and are merged as cached
    (rotated). All evicted keys are merged, text too where the budget does not hold it.

    The budget is `keep` tokens per layer and KV head: sinks, recent, text and vision together. All
    rows vote, so scoring takes O(kv_len^2) time per layer. After the prompt tokens are appended.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (4, as in the released code).
        recent_share: the part of the budget that goes to the newest tokens (half; at most that).
        merging: see above ("pivot", the best of the three in the paper).
    """

    recent_share: float = 0.5
    merging: Literal["pivot", "average", "weighted"] = "pivot"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_fraction("recent_share")
        self._require_one_of("merging", ("pivot", "average", "weighted"))

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Return the classes: padding, vision, text, sinks and recent keys, in rising order."""
        num_recent = floor_share(budget, self.recent_share)
        text = prompt.valid & ~prompt.is_vision
        return self.force(prompt, budget, num_recent=num_recent, preferred=text)

    def merge(self, key: Tensor, value: Tensor, layer: LayerScores, selection: Selection) -> Merged:
        """Merge every evicted key into its most similar kept one; see `MergingPolicy`."""
        sources, match, similarity = match_evicted(key, selection, layer.prompt)
        if self.merging == "weighted":
            merge_by_similarity([key, value], sources, match, similarity)
        else:
            weight = torch.ones(match.shape, device=key.device)
            if self.merging == "pivot":
                # (c + sum of (e + c) / 2) / (n + 1), all weights times 2.
                count = sum_groups(weight[..., None], sources, match)[..., 0]
                weight = weight.where(match >= 0, count + 1)
            ops.merge_tokens_([key, value], sources, match, weight)
        return Merged(layer)
