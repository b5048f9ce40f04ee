"""Oracle of `kvevict.score_keys_by_text`."""

from __future__ import annotations

from torch import Tensor

from kvevict.reference._attention import choose_rows, compute_attention, take


def score_keys_by_text(
    query: Tensor,
    key: Tensor,
    row_index: Tensor,
    *,
    softmax_lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score keys by the text rows, each weighted by the attention it gets from text itself.

    Returns:
        scores [batch_size, 1, kv_len], column_sums [batch_size, 1, kv_len] and
        row_weights [batch_size, num_rows].
    """
    rows = choose_rows(query, key, row_index, key_mask, causal=True)
    abar = compute_attention(query, key, rows, softmax_lse, sm_scale).mean(1)

    # received[b, i, r] is what the key of row r gets from row i.
    received = take(abar, 2, rows.position[:, None, :])
    sees = rows.valid[:, :, None] & (rows.position[:, :, None] >= rows.position[:, None, :])
    row_weights = received.where(sees, 0.0).sum(1) / sees.sum(1).clamp(min=1)
    row_weights = row_weights.where(rows.valid, 0.0)

    scores = (row_weights[..., None] * abar).sum(1, keepdim=True)
    return scores, abar.sum(1, keepdim=True), row_weights
