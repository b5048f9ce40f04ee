"""Methods that merge what they evict into what stays.

Between `select` and the compaction an engine calls `merge` of a `MergingPolicy`, which folds
evicted keys and values into kept ones, in place: the full tensors are about to be freed. So that is
where the memory of a merge comes from, and nobody may rely on their old contents afterwards.

Where a merged key stands for several tokens and the method has attention know it, `merge` returns
weights w: attention adds log(w) to the logits of a key, now, in later turns and while decoding. The
engine keeps them with the kept keys (`kvevict.slots.Slots.key_weight`); a new token has weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import Metric
from kvevict.policies._lists import in_list
from kvevict.policies.base import LayerScores, Prompt, Selection


@dataclass(frozen=True, eq=False)
class Merged:
    """What merging made of a layer, beside its keys and values.

    Attributes:
        layer: the scores that `merge` was given, or those that decoding starts from instead.
        key_weight: [batch_size, 1 | num_kv_heads, kv_len] float32, how many tokens each key counts
            for in attention; only those of kept keys are read. None = as many as before.
    """

    layer: LayerScores
    key_weight: Tensor | None = None


@runtime_checkable
class MergingPolicy(Protocol):
    """Merges evicted keys and values into kept ones."""

    def merge(self, key: Tensor, value: Tensor, layer: LayerScores, selection: Selection) -> Merged:
        """Merge one layer, in place.

        Args:
            key: [batch_size, num_kv_heads, kv_len, head_dim], as cached. Written.
            value: like key. Written.
            layer: its scores.
            selection: what stays of it.
        """
        ...


def merge_layers(
    policy: Any,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layers: Sequence[LayerScores],
    selections: Sequence[Selection],
) -> tuple[list[LayerScores], tuple[Selection, ...]]:
    """Let a policy merge all layers of which something is evicted.

    Args:
        policy: a `MergingPolicy`, or one that merges nothing.
        keys: one [batch_size, num_kv_heads, kv_len, head_dim] per layer. Written.
        values: like keys. Written.
        layers: the scores.
        selections: what stays.

    Returns:
        The scores that decoding starts from, and the selections with the weights of the kept keys.
    """
    new_layers, new_selections = list(layers), list(selections)
    if isinstance(policy, MergingPolicy):
        for i, selection in enumerate(selections):
            if selection.keeps_all:
                continue
            with torch.no_grad():
                merged = policy.merge(keys[i], values[i], layers[i], selection)
            new_layers[i] = merged.layer
            if merged.key_weight is not None:
                weights = _kept(merged.key_weight, selection)
                new_selections[i] = replace(selection, key_weight=weights)
    return new_layers, tuple(new_selections)


def _kept(weights: Tensor, selection: Selection) -> Tensor:
    """Return the weights of the kept keys, 0 behind kept_lens."""
    num_lists = max(weights.shape[1], selection.kept_lens.shape[1])
    rows = weights.expand(-1, num_lists, -1).contiguous()[..., None]
    (kept,), _ = ops.gather_kv([rows], [rows[..., :0]], selection.kept_indices, selection.kept_lens)
    return kept[..., 0]


def evicted_keys(selection: Selection, prompt: Prompt) -> Tensor:
    """Return the real keys that go [batch_size, 1 | num_kv_heads, kv_len] bool."""
    return prompt.valid[:, None] & ~in_list(selection.kept_indices, prompt.kv_len)


def match_evicted(
    key: Tensor, selection: Selection, prompt: Prompt, *, metric: Metric = Metric.COSINE
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the most similar kept key of every evicted one.

    Args:
        key: [batch_size, num_kv_heads, kv_len, head_dim].
        selection: what stays.
        prompt: what the keys are.
        metric: what similar means.

    Returns:
        source_index [batch_size, 1 | num_kv_heads, kv_len] int32, the evicted keys, -1 in the
        places of others; match_index [batch_size, num_kv_heads, kv_len] int32, their targets, -1 =
        none; and the similarity float32 of that shape. A key with NaN, or without a target that can
        be compared with it, has no match.
    """
    place = torch.arange(prompt.kv_len, dtype=torch.int32, device=key.device)
    sources = place.where(evicted_keys(selection, prompt), -1)
    match, similarity = ops.match_tokens(key, sources, selection.kept_indices, metric=metric)
    return sources, match.where(similarity > -torch.inf, -1), similarity


def count_matches(match_index: Tensor) -> Tensor:
    """Return how many keys are matched to each [batch_size, num_kv_heads, kv_len] float32."""
    is_matched = match_index >= 0
    count = torch.zeros(match_index.shape, device=match_index.device)
    # Sums of ones are exact in any order.
    return count.scatter_add_(2, match_index.clamp(min=0).long(), is_matched.float())
