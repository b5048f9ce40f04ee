"""Attention over padded prompts and evicted caches, through transformers' SDPA function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QUERY_BLOCK = 256
"""Query rows per attention call where a mask is needed; the mask is QUERY_BLOCK x kv_len."""

Sdpa = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of (query, key, value, mask): [batch_size, qo_len, num_qo_heads, head_dim]."""


def real_spans(mask: Tensor) -> list[tuple[int, int]] | None:
    """Return first and last + 1 real column of every sequence, None where all are real.

    Synchronizes with the device.

    Args:
        mask: [batch_size, kv_len] bool, False = padding.

    Raises:
        ValueError: if there is padding between real columns.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    first = column.where(mask, mask.shape[1]).amin(1)
    stop = (column + 1).where(mask, 0).amax(1)
    spans = torch.stack([first, stop, mask.sum(1)], 1).tolist()
    if any(stop - first != count for first, stop, count in spans if count):
        raise ValueError("kvevict.evict: padding in the middle of a prompt is not supported")
    if all(count == mask.shape[1] for *_, count in spans):
        return None
    return [(min(first, stop), stop) for first, stop, _ in spans]


def attend_prompt(
    sdpa: Sdpa, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]] | None
) -> Tensor:
    """Attend causally; with padding, sequence by sequence on the real columns."""
    if spans is None:
        return sdpa(query, key, value, None)
    batch_size, num_heads, qo_len, _ = query.shape
    output = value.new_zeros(batch_size, qo_len, num_heads, value.shape[-1])
    for b, (first, stop) in enumerate(spans):
        if stop > first:
            q, k, v = (t[b : b + 1, :, first:stop] for t in (query, key, value))
            output[b : b + 1, first:stop] = sdpa(q, k, v, None)
    return output


def attend_blocks(
    sdpa: Sdpa, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """Attend to a cache that is longer than the new rows, in blocks of rows.

    Args:
        sdpa: attention of some rows with a mask.
        query: the new rows, the last of the conversation.
        key: cached and new keys, the new ones last.
        value: like key.
        mask: [batch_size, 1 | num_kv_heads, kv_len] bool, which keys may be seen, or float32 to be
            added to the logits (rounded to the dtype of query, as SDPA wants it); None = all.
    """
    qo_len, kv_len = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], 1)
    if mask is not None and mask.is_floating_point():
        # Finite, so that a padding row that sees nothing does not become NaN.
        mask = mask.clamp(min=lowest).to(query.dtype)
    if qo_len == 1:
        return sdpa(query, key, value, None if mask is None else mask[:, :, None])
    outputs = []
    for begin in range(0, qo_len, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, qo_len)
        stop = kv_len - qo_len + end
        row = torch.arange(kv_len - qo_len + begin, stop, device=key.device)
        own = (torch.arange(stop, device=key.device) <= row[:, None])[None, None]
        if mask is not None and mask.is_floating_point():
            own = mask[:, :, None, :stop].masked_fill(~own, lowest)
        elif mask is not None:
            own = own & mask[:, :, None, :stop]
            # Here, too: nobody reads such a row.
            own = own | ~own.any(-1, keepdim=True)
        outputs.append(sdpa(query[:, :, begin:end], key[:, :, :stop], value[:, :, :stop], own))
    return torch.cat(outputs, 1)
