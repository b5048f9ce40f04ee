"""How alike the keys of a head are."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import Check
from kvevict.ops._fake import register_fake


def key_diversity(key: Tensor, *, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compares every key with all keys of its head, by cosine.

    With unit keys ``k_j / max(|k_j|, 1e-12)`` and their mean over the N real keys, the product of a
    unit key and the mean is exactly the mean cosine of that key to all real keys, itself included:
    the similarity of KeyDiff (arXiv 2504.15364) up to a constant per head, which keeps its order,
    and of MixKV's diversity (arXiv 2510.20707). The squared norm of the mean gives the mean cosine
    of two different keys, MixKV's redundancy. No N x N matrix exists.

    Args:
        key: [batch_size, num_kv_heads, kv_len, head_dim] float32, float16 or bfloat16, any strides
            with a contiguous last dimension; head_dim a multiple of 8 up to 256.
        key_mask: [batch_size, kv_len] bool, True for a real token; None for all. Masked keys count
            for nothing and may hold anything.

    Returns:
        similarity [batch_size, num_kv_heads, kv_len] float32 in [-1, 1], 0 for masked keys and for
        zero vectors; and redundancy [batch_size, num_kv_heads] float32,
        ``(N * |mean|^2 - 1) / (N - 1)`` clamped to [0, 1], 0 for N < 2. Where a real key has a NaN,
        an infinity or a squared norm beyond float32, both are NaN for its sequence and head, but
        for masked keys and for N < 2.

    Raises:
        ValueError: naming the argument, what it must be and what it is.

    O(num_kv_heads * kv_len * head_dim) time: two passes over the keys, the second one from cache
    where a head fits. Extra memory: head_dim floats per 256 keys of one head per thread.
    """
    results: tuple[Tensor, Tensor] = torch.ops.kvevict.key_diversity(key, key_mask=key_mask)
    return results


@register_fake("key_diversity")
def _(key: Tensor, *, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check = Check("key_diversity")
    check.scorable(key, "key")
    batch_size, num_kv_heads, kv_len, _ = key.shape
    if key_mask is not None:
        check.companion(key_mask, "key_mask", torch.bool, (batch_size, kv_len), key, "key")
    similarity = key.new_empty((batch_size, num_kv_heads, kv_len), dtype=torch.float32)
    return similarity, key.new_empty((batch_size, num_kv_heads), dtype=torch.float32)
