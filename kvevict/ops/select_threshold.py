"""Selection of the keys to keep by thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import ANY, Check
from kvevict.ops._fake import register_fake


def select_threshold(
    sums: Tensor,
    maxima: Tensor,
    candidates: Tensor,
    *,
    ratio: float | None = None,
    kappa: float | None = None,
    alpha: float,
    max_evicted: int | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists the keys that HAE's dual-attention pruning leaves (arXiv 2602.02197), ascending.

    Evicted is a candidate whose sum and whose maximum are both too small: ``sums < threshold`` and
    ``maxima < alpha``, where threshold is ``ratio * total`` or ``kappa / n * total``, total is the
    sum of the sums of a row's n candidates, and ``kappa`` makes the choice the same for prompts of
    any length. If more than max_evicted are, only those with the smallest sums go, and of equal
    sums those of higher index: the order of :func:`select_topk`.

    All of it is float32; the total is added up in one order on every backend (sums of 1024
    consecutive keys, then the sum of these; each in 32 lanes that add up every 32nd value, then
    pairwise at distances 16, 8, 4, 2, 1), so that the result is the same bit for bit. A comparison
    with NaN is false: a key with a NaN sum or maximum is never evicted, and no key of a row in
    which a candidate's sum is NaN.

    Args:
        sums: [batch_size, num_heads, kv_len] float32, attention that each key receives from the
            text rows, as :func:`score_keys` gives it (``SUM``, ``ALL_MEAN``; the text rows as
            row_index).
        maxima: [batch_size, num_heads, kv_len] float32, the same with ``MAX``.
        candidates: [batch_size, kv_len] bool, the keys that may be evicted: those of vision.
        ratio: at least 0; HAE's r, 0.0015 for 576 vision tokens.
        kappa: at least 0, instead of ratio; 0.86 is that r for any number of vision tokens.
        alpha: finite, 0.001 in HAE's companion MustDrop. More than 1 lets only the sums decide.
        max_evicted: how many keys of a row may be evicted at most; any number if None.
        key_mask: [batch_size, kv_len] bool, True for a real token; None for all. Padding is no
            candidate, whatever candidates says, and never kept.

    Returns:
        kept_indices [batch_size, num_heads, kv_len] int32, strictly ascending, then -1; and
        kept_lens [batch_size, num_heads] int32.

    Raises:
        ValueError: naming the argument, what it must be and what it is; also if both or neither of
            ratio and kappa are given.

    O(kv_len) time per row. Extra memory: two copies of a row per thread, on CUDA one per row.
    """
    results: tuple[Tensor, Tensor] = torch.ops.kvevict.select_threshold(
        sums,
        maxima,
        candidates,
        ratio=ratio,
        kappa=kappa,
        alpha=alpha,
        max_evicted=max_evicted,
        key_mask=key_mask,
    )
    return results


@register_fake("select_threshold")
def _(
    sums: Tensor,
    maxima: Tensor,
    candidates: Tensor,
    *,
    ratio: float | None = None,
    kappa: float | None = None,
    alpha: float,
    max_evicted: int | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check = Check("select_threshold")
    check.dtype(sums, "sums", torch.float32)
    check.shape(sums, "sums", ANY, ANY, ANY)
    check.indexable(sums, "sums", 2, "kv_len")
    batch_size, num_heads, kv_len = sums.shape
    check.companion(maxima, "maxima", torch.float32, sums.shape, sums, "sums")
    check.companion(candidates, "candidates", torch.bool, (batch_size, kv_len), sums, "sums")
    if ratio is None and kappa is None:
        check.fail("ratio", "be given if kappa is not", "None")
    if ratio is not None and kappa is not None:
        check.fail("kappa", "be None if ratio is given", "a number")
    for factor, name in ((ratio, "ratio"), (kappa, "kappa")):
        if factor is not None:
            check.not_negative(factor, name)
    check.finite(alpha, "alpha")
    if max_evicted is not None:
        check.at_least(max_evicted, "max_evicted", 0)
    if key_mask is not None:
        check.companion(key_mask, "key_mask", torch.bool, (batch_size, kv_len), sums, "sums")
    kept_indices = sums.new_empty((batch_size, num_heads, kv_len), dtype=torch.int32)
    return kept_indices, sums.new_empty((batch_size, num_heads), dtype=torch.int32)
