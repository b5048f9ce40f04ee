"""LightKV's merging in the cache itself: vision keys into similar neighbors, to a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction
from kvevict.policies._lists import in_list
from kvevict.policies.base import LayerScores, Policy, Prompt, Selection
from kvevict.policies.lightkv import check_windows, plan_windows
from kvevict.policies.merging import Merged, sum_groups


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterScores(LayerScores):
    """Scores beside what becomes of every key.

    Attributes:
        root: [batch_size, kv_len] int64, the key that it is merged into, itself if none.
        cluster: [batch_size, 1, kv_len] float32, the scores of all keys merged into this one, its
            own included.
    """

    root: Tensor
    cluster: Tensor


@dataclass(frozen=True)
class LightKVCache(Policy):
    r"""Merges keys and values after the prompt as LightKV merges hidden states within it.

    LightKV (arXiv 2605.00789, `kvevict.policies.LightKV`) takes rows out between layers. This
    variant, defined here, leaves the forward alone and brings every layer's cache to `keep` tokens:

    - guidance: $\omega_j$ is the attention that key j gets from the text rows after the last vision
      token, averaged over heads (from all rows in a sequence that has none);
    - stages: as in LightKV, one after the other, the vision keys that are left are cut into
      windows, and the 1st, 3rd, ... key of a window is matched to its most similar neighbor among
      the others (cosine of the keys of all heads together, as cached). The most similar pairs of
      the sequence are merged until the vision keys fit the budget, at most all of a stage;
    - a key that c others went into, at first hand or through others, becomes their mean and its
      own, weighted by $\omega$; values likewise. All heads of a layer merge the same keys.

    Text stays, and so do sinks; what the budget does not hold after the last stage is evicted:
    vision of the lowest $\omega$ (that of what was merged into it included), then text. A sequence
    with an image of fewer than 8 windows² keys is left alone at that stage. Merged keys count as
    one token in attention, as in LightKV.

    The budget is `keep` tokens per layer, everything included. One list per layer.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay.
        windows: windows per side of an image, for every stage.
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN

    windows: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_windows("LightKVCache", self.windows)

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the text rows after the last vision token, or all rows where there are none."""
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
    ) -> ClusterScores:
        """Score the keys and find out which of them are merged."""
        rows = self.row_index(prompt) if row_index is None else row_index
        layer = super().observe(
            query, key, value, prompt, rows, sm_scale=sm_scale, softmax_lse=softmax_lse
        )
        is_vision = prompt.is_vision & (prompt.rank_from_start >= self.num_sink)
        room = self.keep_tokens(prompt) - (prompt.valid & ~is_vision).sum(1)
        # All heads of a token side by side; a copy, that is merged from stage to stage.
        tokens = key.transpose(1, 2).flatten(2)[:, None].to(torch.float32, copy=True)
        cluster, alive = layer.scores.nan_to_num(), prompt.valid
        root = torch.arange(prompt.kv_len, device=key.device).repeat(len(key), 1)
        sequence = torch.arange(len(key), device=key.device)[:, None]
        for window in self.windows:
            # Windows are cut from what is left, side by side.
            order = (~alive).byte().sort(dim=1, stable=True).indices
            modality = prompt.modality.where(is_vision, 0)[sequence, order]
            plan = plan_windows(Prompt(modality, alive[sequence, order]), window, 0.5)
            source, target = (
                order[sequence, members.long()].where(members >= 0, -1).int()[:, None]
                for members in (plan.members(odd=False), plan.members(odd=True))
            )
            group = plan.group[:, None]
            match, similarity = ops.match_tokens(
                tokens, source, target, source_group=group, target_group=group
            )
            excess = ((alive & is_vision).sum(1) - room).clamp(min=0, max=prompt.kv_len)
            pairs, _ = ops.select_topk(
                similarity,
                prompt.kv_len,
                row_k=excess[:, None].int(),
                priority=(match >= 0).byte(),
            )
            match = match.where(in_list(pairs, prompt.kv_len), -1)
            ops.merge_tokens_([tokens], source, match, cluster)
            cluster = sum_groups(cluster[..., None], source, match)[..., 0]
            goes_to = torch.arange(prompt.kv_len + 1, device=key.device).repeat(len(key), 1)
            place = source[:, 0].where(match[:, 0] >= 0, prompt.kv_len).long()
            goes_to.scatter_(1, place, match[:, 0].long())
            root = goes_to[sequence, root]
            alive = alive & ~in_list(place, prompt.kv_len)
        return ClusterScores(**vars(layer), root=root, cluster=cluster)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Return the classes: padding, vision, text, sinks, in rising order."""
        return self.force(prompt, budget, preferred=prompt.valid & ~prompt.is_vision)

    def ranking(self, layer: LayerScores, priority: Tensor) -> Tensor:
        """Return the scores of the clusters, of keys that are merged into others last."""
        assert isinstance(layer, ClusterScores)
        return layer.cluster.where(_is_root(layer)[:, None], -1.0)

    def merge(self, key: Tensor, value: Tensor, layer: LayerScores, selection: Selection) -> Merged:
        """Merge every key that has a root that stays; see `MergingPolicy`."""
        assert isinstance(layer, ClusterScores)
        kept = in_list(selection.kept_indices[:, 0], layer.prompt.kv_len)
        sequence = torch.arange(len(kept), device=kept.device)[:, None]
        goes = ~_is_root(layer) & kept[sequence, layer.root] & ~kept
        place = torch.arange(layer.prompt.kv_len, device=kept.device)
        source, match = (index.where(goes, -1).int()[:, None] for index in (place, layer.root))
        ops.merge_tokens_([key, value], source, match, layer.scores.nan_to_num())
        return Merged(layer)


def _is_root(layer: ClusterScores) -> Tensor:
    """Return the keys that are merged into nothing [batch_size, kv_len] bool."""
    return layer.root == torch.arange(layer.root.shape[1], device=layer.root.device)
