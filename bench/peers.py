"""What a user of plain torch would run instead: written here from the formulas, no library's code.

Eager functions do what the published implementations do, step by step. `torch.compile` of them and
the best composition of torch operators that we know are the strong peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.shapes import CacheInputs, MergeInputs


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, specialized for each shape."""
    return torch.compile(function, dynamic=False, fullgraph=True)


# --- scoring -------------------------------------------------------------------------------------


def repeat_kv(states: Tensor, group_size: int) -> Tensor:
    """Copies every KV head for each of its query heads, as eager model code does."""
    if group_size == 1:
        return states
    batch_size, num_kv_heads, kv_len, head_dim = states.shape
    states = states[:, :, None].expand(-1, -1, group_size, -1, -1)
    return states.reshape(batch_size, num_kv_heads * group_size, kv_len, head_dim)


def snapkv_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the last rows as kvpress' SnapKV computes it [.., num_rows, kv_len]."""
    num_rows, kv_len = query.shape[2], key.shape[2]
    keys = repeat_kv(key, query.shape[1] // key.shape[1])
    weights = torch.matmul(query, keys.transpose(2, 3)) / math.sqrt(query.shape[3])
    mask = torch.ones_like(weights) * float("-inf")
    weights = weights + torch.triu(mask, diagonal=kv_len - num_rows + 1)
    return F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)


def group_mean(scores: Tensor, num_kv_heads: int) -> Tensor:
    """[batch_size, num_qo_heads, n] -> [batch_size, num_kv_heads, n]."""
    return scores.unflatten(1, (num_kv_heads, -1)).mean(2)


def snapkv_scores(query: Tensor, key: Tensor) -> Tensor:
    """Sum over the rows and mean over the group, all keys [batch_size, num_kv_heads, kv_len]."""
    return group_mean(snapkv_attention(query, key).sum(-2), key.shape[1])


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """The same scores as the compiler likes them best: no copies of keys, no stored attention."""
    num_rows, kv_len = query.shape[2], key.shape[2]
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    logits = torch.matmul(rows, key.transpose(2, 3)).unflatten(2, (-1, num_rows))
    position = torch.arange(kv_len, device=query.device)
    sees = position <= position[kv_len - num_rows :, None]
    logits = (logits.float() * query.shape[3] ** -0.5).where(sees, float("-inf"))
    return (logits - logits.logsumexp(-1, keepdim=True)).exp().sum(-2).mean(2)


def scores_given_lse(query: Tensor, key: Tensor, softmax_lse: Tensor) -> Tensor:
    """The same scores from a known log-sum-exp [batch_size, num_qo_heads, num_rows]."""
    logits = masked_logits(query, key).float() - softmax_lse.unsqueeze(-1)
    return group_mean(logits.exp().sum(-2), key.shape[1])


def accumulated_scores(scores: Tensor, query: Tensor, key: Tensor, decay: float) -> Tensor:
    """Old scores that decay and the attention of the rows, from eager scores."""
    return scores * decay + snapkv_scores(query, key)


def accumulated_grouped_scores(scores: Tensor, query: Tensor, key: Tensor, decay: float) -> Tensor:
    """The same as the compiler likes it best."""
    return scores * decay + grouped_scores(query, key)


def attention_lse(query: Tensor, key: Tensor) -> Tensor:
    """Log-sum-exp of every row [batch_size, num_qo_heads, num_rows]."""
    return masked_logits(query, key).float().logsumexp(-1)


def masked_logits(query: Tensor, key: Tensor) -> Tensor:
    """Logits with a broadcast causal mask: the cheap way to mask in eager torch."""
    num_rows, kv_len = query.shape[2], key.shape[2]
    keys = repeat_kv(key, query.shape[1] // key.shape[1])
    logits = torch.matmul(query, keys.transpose(2, 3)) * query.shape[3] ** -0.5
    hidden = torch.ones(num_rows, kv_len, dtype=torch.bool, device=query.device)
    return logits.masked_fill_(hidden.triu(kv_len - num_rows + 1), float("-inf"))


def tgv_scores(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Text-weighted scores of TGV-KV in eager torch; the rows are the text after the image.

    The attention matrix of the text rows only, where the released code takes that of all rows from
    the model's eager attention. Returns scores and column_sums [batch_size, 1, kv_len] and
    row_weights [batch_size, num_rows].
    """
    num_rows = query.shape[2]
    attention = F.softmax(masked_logits(query, key), dim=-1, dtype=torch.float32)
    mean_attention = attention.to(query.dtype).mean(1)
    text_block = mean_attention[..., -num_rows:]
    sees = torch.arange(num_rows, 0, -1, device=query.device)
    row_weights = text_block.sum(1) / sees
    scores = (mean_attention * row_weights.unsqueeze(-1)).sum(1, keepdim=True)
    return scores, mean_attention.sum(1, keepdim=True), row_weights


# --- diversity -----------------------------------------------------------------------------------


def key_diversity(key: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosines in the dtype of the keys, as kvpress' KeyDiff and MixKV compute them.

    Returns similarity [batch_size, num_kv_heads, kv_len] and redundancy [.., num_kv_heads].
    """
    kv_len = key.shape[2]
    unit = F.normalize(key, dim=-1)
    mean = unit.mean(2, keepdim=True)
    similarity = (unit * mean).sum(-1)
    square = mean.float().square().sum((2, 3))
    return similarity, ((kv_len * square - 1) / (kv_len - 1)).clamp(0, 1)


def mix_scores(
    scores: Tensor, similarity: Tensor, value_norm: Tensor, redundancy: Tensor
) -> Tensor:
    """The composite score of MixKV, all keys candidates."""

    def scaled(values: Tensor, mean: Tensor) -> Tensor:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        unit = (values - low) / (high - low + 1e-8)
        return unit * mean / (unit.mean(-1, keepdim=True) + 1e-8)

    mean = scores.mean(-1, keepdim=True)
    weight = redundancy.unsqueeze(-1)
    importance = scores + scaled(value_norm, mean)
    return weight * scaled(-similarity, mean) + (1 - weight) * importance


# --- selection -----------------------------------------------------------------------------------


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """The k best keys in ascending order [.., k] int64."""
    return torch.topk(scores, k, dim=-1, sorted=False).indices.sort(dim=-1).values


# --- moving --------------------------------------------------------------------------------------


def gather_rows(states: Tensor, index: Tensor) -> Tensor:
    """torch.gather with the index expanded over head_dim, as kvpress does; index int64."""
    return states.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, states.shape[3]))


def flat_rows(states: Tensor, flat_index: Tensor) -> Tensor:
    """index_select on the cache seen as a list of rows."""
    return states.view(-1, states.shape[3]).index_select(0, flat_index)


def gather_cache(inputs: CacheInputs) -> list[Tensor]:
    """Kept keys and values of all layers by torch.gather."""
    return [
        gather_rows(layer, index)
        for states in (inputs.keys, inputs.values)
        for layer, index in zip(states, inputs.gather_index, strict=True)
    ]


def index_select_cache(inputs: CacheInputs) -> list[Tensor]:
    """Kept keys and values of all layers by index_select."""
    heads = inputs.kept_indices.shape[1:]
    return [
        flat_rows(layer, index).view(*heads, -1)
        for states in (inputs.keys, inputs.values)
        for layer, index in zip(states, inputs.flat_index, strict=True)
    ]


MOVES = {"gather": gather_cache, "index_select": index_select_cache}


# --- rotating ------------------------------------------------------------------------------------


def rerotate(
    keys: list[Tensor], old_positions: Tensor, new_positions: Tensor, inv_freq: Tensor
) -> list[Tensor]:
    """Keys turned by the difference of positions, as kvpress and model code rotate them.

    Positions are [batch_size, kv_len], or [num_layers, batch_size, num_kv_heads, kv_len].
    """
    by_layer = old_positions.dim() == 4
    if by_layer:
        new_positions = new_positions[None, :, None]
    distance = (new_positions - old_positions).float()
    distances = distance if by_layer else [distance[:, None]] * len(keys)
    return [
        rotate_half(key, d[..., None] * inv_freq) for key, d in zip(keys, distances, strict=True)
    ]


def rotate_half(key: Tensor, angle: Tensor) -> Tensor:
    """Pairs of channels (c, c + head_dim / 2) turned by angle [.., head_dim / 2]."""
    angle = torch.cat([angle, angle], dim=-1)
    a, b = key.chunk(2, dim=-1)
    return key * angle.cos().to(key.dtype) + torch.cat([-b, a], dim=-1) * angle.sin().to(key.dtype)


# --- merging -------------------------------------------------------------------------------------


def nearest(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each source and its place, from the whole matrix of similarities."""
    unit_sources = F.normalize(sources, dim=-1)
    unit_targets = F.normalize(targets, dim=-1)
    return (unit_sources @ unit_targets.transpose(-1, -2)).max(-1)


def nearest_kept(inputs: MergeInputs) -> tuple[Tensor, Tensor]:
    """The nearest kept key of each evicted one, in fp32 as kvpress computes it."""
    evicted = gather_rows(inputs.key, inputs.evicted.long()).float()
    kept = gather_rows(inputs.key, inputs.kept.long()).float()
    similarity, place = nearest(evicted, kept)
    return inputs.kept.gather(2, place), similarity


def nearest_in_windows(tokens: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same for windows of one size [batch_size, num_windows, size] of tokens [.., dim]."""
    batch = torch.arange(tokens.shape[0], device=tokens.device).view(-1, 1, 1)
    rows = (tokens[batch, 0, index.long()] for index in (sources, targets))
    similarity, place = nearest(*rows)
    return targets.gather(2, place), similarity


def merge_rows(states: Tensor, inputs: MergeInputs) -> Tensor:
    """The weighted mean of targets and the rows that are matched to them, of all tokens."""
    weight = inputs.weight.unsqueeze(-1)
    sums = states.float() * weight
    target = inputs.match.long()
    rows = target.unsqueeze(-1).expand(-1, -1, -1, states.shape[3])
    weighted = gather_rows(sums, inputs.evicted.long())
    sums = sums.scatter_add(2, rows, weighted)
    divisor = inputs.weight.scatter_add(2, target, inputs.weight.gather(2, inputs.evicted.long()))
    is_target = torch.zeros_like(inputs.weight, dtype=torch.bool).scatter(2, target, True)
    merged = (sums / divisor.unsqueeze(-1)).to(states.dtype)
    return torch.where(is_target.unsqueeze(-1), merged, states)


def merge_cache(inputs: MergeInputs) -> list[Tensor]:
    """Keys and values with the evicted tokens merged, by scatter_add."""
    return [merge_rows(states, inputs) for states in (inputs.key, inputs.value)]


def merging_press(key: Tensor, value: Tensor, kept: Tensor) -> list[Tensor]:
    """Kept keys and values, each the mean of itself and the evicted ones nearest to it.

    The steps of kvpress: a mask and nonzero find the evicted, gathers copy both sides, an fp32
    matmul compares all pairs, scatter_add adds up.
    """
    kept = kept.long()
    is_evicted = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    is_evicted.scatter_(2, kept, False)
    evicted = is_evicted.nonzero()[:, 2].view(*key.shape[:2], -1)
    evicted_key, kept_key = gather_rows(key, evicted), gather_rows(key, kept)
    _, place = nearest(evicted_key.float(), kept_key.float())
    rows = place.unsqueeze(-1).expand(-1, -1, -1, key.shape[3])
    count = torch.ones(kept.shape, device=key.device)
    count.scatter_add_(2, place, torch.ones(place.shape, device=key.device))
    merged = []
    for states, kept_states in ((key, kept_key), (value, gather_rows(value, kept))):
        sums = kept_states.float().scatter_add_(2, rows, gather_rows(states, evicted).float())
        merged.append((sums / count.unsqueeze(-1)).to(states.dtype))
    return merged


# --- score, select and move ----------------------------------------------------------------------


def snapkv_press(
    query: Tensor, key: Tensor, value: Tensor, budget: int, pool_kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """SnapKV as kvpress runs it for one layer: the window's keys are kept, the others pooled."""
    num_rows = query.shape[2]
    attention = snapkv_attention(query, key)[..., :-num_rows]
    pooled = F.avg_pool1d(
        attention.mean(-2), kernel_size=pool_kernel, padding=pool_kernel // 2, stride=1
    )
    scores = group_mean(pooled, key.shape[1])
    scores = F.pad(scores, (0, num_rows), value=scores.max().item())
    index = scores.topk(budget, dim=-1).indices
    return gather_rows(key, index).contiguous(), gather_rows(value, index).contiguous(), index


def window_scores(query: Tensor, key: Tensor, pool_kernel: int) -> Tensor:
    """SnapKV's scores, the window's keys at +inf; made for the compiler."""
    num_rows = query.shape[2]
    scores = grouped_scores(query, key)[..., :-num_rows]
    pooled = F.avg_pool1d(scores, pool_kernel, stride=1, padding=pool_kernel // 2)
    return F.pad(pooled, (0, num_rows), value=float("inf"))


def best_composition(
    query: Tensor, key: Tensor, value: Tensor, budget: int, pool_kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest composition of torch operators known to us: compiled scores, index_select."""
    index = topk_sorted(compiled(window_scores)(query, key, pool_kernel), budget)
    first_row = torch.arange(key.shape[0] * key.shape[1], device=key.device) * key.shape[2]
    flat_index = (index + first_row.view(*index.shape[:2], 1)).flatten()
    heads = index.shape
    return (
        flat_rows(key, flat_index).view(*heads, -1),
        flat_rows(value, flat_index).view(*heads, -1),
        index,
    )
