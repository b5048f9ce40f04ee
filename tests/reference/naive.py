"""The contract a second time, one row and one key at a time, to check the oracles against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_keys(
    b: int, row: int, qo_len: int, kv_len: int, key_mask: Tensor | None, causal: bool
) -> list[int]:
    """Return the keys that query row `row` of sequence `b` sees; none if it is padding."""
    real = [j for j in range(kv_len) if key_mask is None or bool(key_mask[b, j])]
    if not causal:
        return real
    position = kv_len - qo_len + row
    return [j for j in real if j <= position] if position in real else []


def attention_row(
    query: Tensor,
    key: Tensor,
    b: int,
    head: int,
    row: int,
    *,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, float]:
    """Return softmax(q k^T) of one row [kv_len] and its log-sum-exp."""
    kv_len, head_dim = key.shape[2:]
    seen = visible_keys(b, row, query.shape[2], kv_len, key_mask, causal)
    attention = torch.zeros(kv_len, dtype=torch.float64)
    if not seen:
        return attention, -math.inf
    scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
    kv_head = head // (query.shape[1] // key.shape[1])
    logits = torch.stack([query[b, head, row].double() @ key[b, kv_head, j].double() for j in seen])
    attention[seen] = torch.softmax(logits * scale, dim=0)
    return attention, math.log(sum(math.exp(x) for x in (logits * scale).tolist()))


def ranking(scores: list[float], priority: list[int]) -> list[int]:
    """Return the indices of all keys, best first, by Python's own sort."""

    def sort_key(j: int) -> tuple[int, bool, float, int]:
        nan = math.isnan(scores[j])
        return -priority[j], nan, 0.0 if nan else -scores[j], j

    return sorted(range(len(scores)), key=sort_key)
