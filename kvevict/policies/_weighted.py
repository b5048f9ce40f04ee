"""Attention from rows that count less with age, to keys that may count for several tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies.base import Prompt

ROWS_AT_ONCE = 256
"""Rows of attention, of all query heads of a group together, that exist at the same time."""


def decayed(row_index: Tensor, decay: float) -> Tensor:
    """Return decay ** age of every row [batch_size, num_rows] float32, the last one's age being 0.

    Args:
        row_index: [batch_size, num_rows] int32, -1 beyond a sequence's own rows; 0 for these.
        decay: at most 1.
    """
    is_row = row_index >= 0
    age = is_row.sum(1, keepdim=True) - 1
    age = age - torch.arange(row_index.shape[1], device=row_index.device)
    return (decay ** age.clamp(min=0).float()).where(is_row, 0.0)


def score_prompt(
    query: Tensor,
    key: Tensor,
    prompt: Prompt,
    row_index: Tensor,
    row_weight: Tensor,
    *,
    sm_scale: float | None,
    softmax_lse: Tensor | None,
) -> Tensor:
    """Score the keys of a prompt, some of which an earlier turn may have merged.

    Args:
        query: see `PrefillPolicy.observe`.
        key: likewise.
        prompt: likewise.
        row_index: [batch_size, num_rows] int32, -1 = none.
        row_weight: [batch_size, num_rows] float32.
        sm_scale: the scale of the logits.
        softmax_lse: if the engine has it.

    Returns:
        [batch_size, num_kv_heads, kv_len] float32.
    """
    if prompt.key_weight is None:
        return ops.score_keys(
            query,
            key,
            row_index=row_index,
            row_weight=row_weight,
            softmax_lse=softmax_lse,
            key_mask=prompt.key_mask,
            sm_scale=sm_scale,
        )
    return score_weighted(
        query,
        key,
        prompt.key_weight,
        row_index=row_index,
        row_weight=row_weight,
        key_mask=prompt.valid[:, None],
        sm_scale=sm_scale,
    )


def score_weighted(
    query: Tensor,
    key: Tensor,
    key_weight: Tensor,
    *,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
) -> Tensor:
    """Score keys as `kvevict.score_keys` does, with log(key_weight) added to the logits.

    For the few keys that an eviction has left, so in plain torch and float32: O(ROWS_AT_ONCE *
    kv_len) memory per KV head.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim].
        key: [batch_size, num_kv_heads, kv_len, head_dim].
        key_weight: [batch_size, 1 | num_kv_heads, kv_len] float32, positive for real keys.
        row_index: [batch_size, num_rows] int32, -1 = none; None = all rows.
        row_weight: [batch_size, num_rows] float32, of each entry of row_index; None = 1.
        key_mask: [batch_size, 1 | num_kv_heads, kv_len] bool, False = padding or an empty slot.
        sm_scale: the scale of the logits; None = 1 / sqrt(head_dim).

    Returns:
        [batch_size, num_kv_heads, kv_len] float32, the mean over the query heads of a group.
    """
    batch_size, num_qo_heads, qo_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    mask = torch.ones_like(key_weight, dtype=torch.bool) if key_mask is None else key_mask
    bias, hidden = key_weight.log()[:, :, None, None], ~mask[:, :, None, None]
    sequence = torch.arange(batch_size, device=key.device)[:, None]
    column = torch.arange(kv_len, device=key.device)
    if row_index is None:
        row_index = torch.arange(qo_len, device=key.device).expand(batch_size, -1)
    keys = key.float().mT[:, :, None]
    scores = torch.zeros(batch_size, num_kv_heads, kv_len, device=key.device)
    group_size = num_qo_heads // num_kv_heads
    num_rows = max(1, ROWS_AT_ONCE // group_size)
    for first in range(0, row_index.shape[1], num_rows):
        rows = row_index[:, first : first + num_rows].long()
        position = kv_len - qo_len + rows
        states = query.transpose(1, 2)[sequence, rows].transpose(1, 2)
        states = states.reshape(batch_size, num_kv_heads, group_size, *states.shape[2:])
        logits = (states.float() @ keys * scale + bias).masked_fill(hidden, -torch.inf)
        logits = logits.masked_fill((column > position[..., None])[:, None, None], -torch.inf)
        # Rows that are padding have no vote, in lists that hold nothing there is none at all.
        votes = mask.transpose(1, 2)[sequence, position].transpose(1, 2) & (rows >= 0)[:, None]
        attention = logits.softmax(-1).where(votes[:, :, None, :, None], 0.0)
        if row_weight is not None:
            attention = attention * row_weight[:, None, None, first : first + num_rows, None]
        scores += attention.sum(3).mean(2)
    return scores
