"""Oracle of `kvevict.attention_lse`."""

from __future__ import annotations

from torch import Tensor

from kvevict.reference._attention import choose_rows, compute_logits


def attention_lse(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Return the log-sum-exp of every row [batch_size, num_qo_heads, qo_len]."""
    rows = choose_rows(query, key, None, key_mask, causal)
    return compute_logits(query, key, rows, sm_scale).logsumexp(-1)
