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
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import Metric
from kvevict.policies._lists import at, in_list
from kvevict.policies.base import LayerScores, Prompt, Selection

if TYPE_CHECKING:
    from kvevict.policies.decode import Victims
    from kvevict.slots import Slots


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


def key_weights(layer: LayerScores) -> Tensor:
    """Return how many tokens each key counts for, like the scores; 1 unless some were merged."""
    weights = layer.prompt.key_weight
    return torch.ones_like(layer.scores) if weights is None else weights


def weigh_slots(slots: Slots) -> None:
    """Let every stored key count for a token, where none has a weight."""
    if slots.key_weight is None:
        slots.weigh(torch.ones_like(slots.scores))


def match_evicted(
    key: Tensor, selection: Selection, prompt: Prompt
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the most similar kept key, by cosine, of every evicted one.

    Args:
        key: [batch_size, num_kv_heads, kv_len, head_dim].
        selection: what stays.
        prompt: what the keys are.

    Returns:
        source_index [batch_size, 1 | num_kv_heads, kv_len] int32, the evicted keys, -1 in the
        places of others; match_index [batch_size, num_kv_heads, kv_len] int32, their targets, -1 =
        none; and the similarity float32 of that shape. A key with NaN, or without a target that can
        be compared with it, has no match.
    """
    place = torch.arange(prompt.kv_len, dtype=torch.int32, device=key.device)
    goes = prompt.valid[:, None] & ~in_list(selection.kept_indices, prompt.kv_len)
    sources = place.where(goes, -1)
    match, similarity = ops.match_tokens(key, sources, selection.kept_indices)
    return sources, match.where(similarity > -torch.inf, -1), similarity


def match_victims(
    slots: Slots, victims: Victims, targets: Tensor, *, metric: Metric = Metric.COSINE
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the most similar target of every key that is about to go while decoding.

    Args:
        slots: one layer, with a list per KV head.
        victims: what goes.
        targets: [batch_size, num_kv_heads, num_targets] int32, slots, -1 = none.
        metric: what similar means.

    Returns:
        What `match_evicted` does, [batch_size, num_kv_heads, stored] each.
    """
    match, similarity = ops.match_tokens(slots.keys, victims.slots, targets, metric=metric)
    match = match.where(similarity > -torch.inf, -1)
    batch_size, num_lists, _ = match.shape
    place = victims.slots.where(victims.slots >= 0, slots.stored).long()

    def in_place(values: Tensor) -> Tensor:
        full = values.new_full((batch_size, num_lists, slots.stored + 1), -1)
        return full.scatter_(2, place, values)[..., : slots.stored]

    return in_place(victims.slots), in_place(match), in_place(similarity)


def others_than(slots: Slots, victims: Victims) -> Tensor:
    """Return the slots whose keys stay [batch_size, num_lists, stored] int32, -1 = none."""
    place = torch.arange(slots.stored, dtype=torch.int32, device=slots.keys.device)
    stays = (slots.columns >= 0) & ~in_list(victims.slots, slots.stored)
    return place.where(stays, -1)


def sum_groups(values: Tensor, source_index: Tensor, match_index: Tensor) -> Tensor:
    """Add up what is merged: a target's own value and those of its sources, in their order.

    Args:
        values: [batch_size, num_kv_heads, kv_len, n] float32, n at most 8.
        source_index: [batch_size, 1 | num_kv_heads, num_sources] int32.
        match_index: [batch_size, num_kv_heads, num_sources] int32.

    Returns:
        Like values; of keys that are no target, their own.
    """
    sums = torch.nn.functional.pad(values, (0, 8 - values.shape[3]))
    one = torch.ones(values.shape[:3], device=values.device)
    ops.merge_tokens_([sums], source_index, match_index, one, normalize=False)
    return sums[..., : values.shape[3]]


def merge_by_similarity(
    tensors: Sequence[Tensor], source_index: Tensor, match_index: Tensor, similarity: Tensor
) -> None:
    """Turn targets c of n sources e into (c + sum of similarity * e) / (n + 1), in place.

    Args:
        tensors: [batch_size, num_kv_heads, kv_len, head_dim] each.
        source_index: [batch_size, 1 | num_kv_heads, kv_len] int32; a source is in its own place.
        match_index: [batch_size, num_kv_heads, kv_len] int32.
        similarity: like match_index float32.
    """
    one = torch.ones((*match_index.shape, 1), device=match_index.device)
    share = 1 / sum_groups(one, source_index, match_index)[..., 0]
    is_source = match_index >= 0
    weight = (similarity * at(share, match_index)).where(is_source, share)
    ops.merge_tokens_(tensors, source_index, match_index, weight, normalize=False)
