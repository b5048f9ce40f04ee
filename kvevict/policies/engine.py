"""The smallest engine: a prompt of which all tensors are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kvevict.policies.base import (
    LayerScores,
    PrefillPolicy,
    Prompt,
    Selection,
    compact_layers,
    observer,
    select_layers,
)
from kvevict.policies.merging import MergingPolicy, merge_layers


def evict_prompt(
    policy: PrefillPolicy,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    prompt: Prompt,
    *,
    sm_scale: float | None = None,
) -> tuple[list[Tensor], list[Tensor], tuple[Selection, ...] | None]:
    """Run a policy over a prompt whose tensors are all at hand.

    The tensors given are not written to: a `MergingPolicy` works on a copy of them. Channels that
    a `ChannelPolicy` drops are none of this function's business; see `kvevict.channels`.

    Args:
        policy: what to keep.
        queries: one [batch_size, num_qo_heads, qo_len, head_dim] per layer.
        keys: one [batch_size, num_kv_heads, kv_len, head_dim] per layer.
        values: like keys.
        prompt: what the keys are.
        sm_scale: the scale of the logits; None = 1 / sqrt(head_dim).

    Returns:
        The kept keys and values per layer, and the selections (None: nothing was evicted, the
        tensors are the ones given).
    """
    prompt = replace(prompt, qo_len=queries[0].shape[2]) if queries else prompt
    row_index = policy.row_index(prompt)
    layers: list[LayerScores] = []
    for query, key, value in zip(queries, keys, values, strict=True):
        observe = observer(policy, layers[0] if layers else None)
        layers.append(observe(query, key, value, prompt, row_index, sm_scale=sm_scale))
    selections = select_layers(policy, layers)
    if selections is None:
        return list(keys), list(values), None
    if isinstance(policy, MergingPolicy):
        keys, values = ([tensor.clone() for tensor in tensors] for tensors in (keys, values))
        _, selections = merge_layers(policy, keys, values, layers, selections)
    return *compact_layers(keys, values, selections), selections
