"""The attention of chosen query rows, materialized. Shared by the scoring oracles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which query rows are looked at, and what each may see.

    index: [batch_size, num_rows] int64, row of the query, or -1.
    position: [batch_size, num_rows] int64, key position that the row stands at, or -1.
    valid: [batch_size, num_rows] bool, False for an entry of -1 and for padding.
    visible: [batch_size, num_rows, kv_len] bool, the keys that the row sees.
    """

    index: Tensor
    position: Tensor
    valid: Tensor
    visible: Tensor


def choose_rows(
    query: Tensor,
    key: Tensor,
    row_index: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
) -> Rows:
    """Resolve `row_index` (None = all rows), the padding and the causal mask."""
    batch_size, qo_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    if row_index is None:
        row_index = torch.arange(qo_len, device=query.device).expand(batch_size, qo_len)
    if key_mask is None:
        key_mask = torch.ones(batch_size, kv_len, dtype=torch.bool, device=query.device)

    index = row_index.long()
    position = (kv_len - qo_len + index).where(index >= 0, -1)
    valid = take(key_mask, 1, position) if causal else index >= 0
    visible = key_mask[:, None, :] & valid[:, :, None]
    if causal:
        visible = visible & (torch.arange(kv_len, device=query.device) <= position[..., None])
    return Rows(index, position, valid, visible)


def take(source: Tensor, dim: int, index: Tensor) -> Tensor:
    """Gather along a dimension; an index of -1 gives 0. The other dimensions broadcast."""
    size = source.shape[dim]
    zero = source.new_zeros([1 if d == dim else n for d, n in enumerate(source.shape)])
    shape = [index.shape[d] if d == dim else n for d, n in enumerate(source.shape)]
    place = index.where(index >= 0, size).expand(shape)
    return torch.cat([source, zero], dim).gather(dim, place)


def compute_logits(query: Tensor, key: Tensor, rows: Rows, sm_scale: float | None) -> Tensor:
    """Return float64 logits [batch_size, num_qo_heads, num_rows, kv_len], -inf where unseen."""
    scale = query.shape[3] ** -0.5 if sm_scale is None else sm_scale
    chosen = take(query.double(), 2, rows.index[:, None, :, None])
    repeated = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = chosen @ repeated.transpose(-1, -2) * scale
    return logits.masked_fill(~rows.visible[:, None], -torch.inf)


def compute_attention(
    query: Tensor,
    key: Tensor,
    rows: Rows,
    softmax_lse: Tensor | None,
    sm_scale: float | None,
) -> Tensor:
    """Return probabilities [batch_size, num_qo_heads, num_rows, kv_len], 0 where unseen.

    A row with a log-sum-exp of -inf sees nothing.
    """
    logits = compute_logits(query, key, rows, sm_scale)
    if softmax_lse is None:
        lse = logits.logsumexp(-1)
    else:
        lse = take(softmax_lse.double(), 2, rows.index[:, None, :])
    seen = rows.visible[:, None] & (lse != -torch.inf)[..., None]
    return (logits - lse[..., None]).exp().where(seen, 0.0)
