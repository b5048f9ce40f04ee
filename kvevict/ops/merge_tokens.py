"""Tokens merged into others, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvevict.ops._check import ANY, Check, check_token_lists
from kvevict.ops._fake import register_fake


def merge_tokens_(
    tensors: Sequence[Tensor],
    source_index: Tensor,
    match_index: Tensor,
    weight: Tensor,
    *,
    normalize: bool = True,
) -> None:
    """Replaces every target by a weighted sum of itself and the sources that are matched to it.

    With ``x`` the tokens of a tensor, ``w`` their weights and ``M`` the sources of target ``b``::

        x[b] = (w[b] * x[b] + sum of w[a] * x[a] over a in M) / (w[b] + sum of w[a])

    which is LightKV's merge by guidance weights (arXiv 2605.00789, section 3), D2O's and LOOK-M's
    mean with similarities or ones as weights, and ZSMerge's mean by the number of tokens that a
    slot stands for. Where the weights sum to at most 1e-8, the target becomes the plain mean.
    Without ``normalize`` there is no division, for methods with coefficients of their own
    (KeepKV). Sums are taken in float32, the target first, then sources in the order of
    source_index, and rounded once. Tokens that are no target keep every byte, also sources. A
    refused call leaves every byte as it was.

    Args:
        tensors: [batch_size, num_heads, num_tokens, dim] each, float32, float16 or bfloat16, any
            strides with a contiguous last dimension; dim any multiple of 8. dim and dtype may
            differ: keys and values of a layer, or hidden states. Written; no two may share
            elements.
        source_index: [batch_size, num_heads | 1, num_sources] int32, positions of tokens; -1 for
            none.
        match_index: [batch_size, num_heads | 1, num_sources] int32, the position of the target of
            each source, as from :func:`match_tokens`; -1, or a source of -1, for a pair that is not
            merged. No token may be a merged source and a target.
        weight: [batch_size, num_heads | 1, num_tokens] float32, finite, of each token.
        normalize: whether to divide by the sum of the weights.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of source_index,
            match_index and weight are checked on the CPU only. On CUDA a position that is not one
            of the tokens counts as -1, and a source that is a target too may be read before or
            after it is written.

    Reads every merged row once and writes every target once. Extra memory: a pair of positions per
    source.
    """
    torch.ops.kvevict.merge_tokens_(tensors, source_index, match_index, weight, normalize=normalize)


@register_fake("merge_tokens_")
def _(
    tensors: Sequence[Tensor],
    source_index: Tensor,
    match_index: Tensor,
    weight: Tensor,
    *,
    normalize: bool = True,
) -> None:
    check = Check("merge_tokens_")
    check.at_least(len(tensors), "len(tensors)", 1)
    for i, tensor in enumerate(tensors):
        name = f"tensors[{i}]"
        check.device(tensor, name, tensors[0], "tensors[0]")
        check.dtype(tensor, name, torch.float32, torch.float16, torch.bfloat16)
        check.shape(tensor, name, *(tensors[0].shape[:3] if i > 0 else (ANY, ANY, ANY)), ANY)
        check.contiguous_last_dim(tensor, name)
        if tensor.shape[3] < 8 or tensor.shape[3] % 8 != 0:
            check.fail(name, "have a dim that is a multiple of 8", tensor.shape[3])
    check_token_lists(check, source_index, "source_index", tensors[0], "tensors[0]")
    num_sources = source_index.shape[2]
    check_token_lists(check, match_index, "match_index", tensors[0], "tensors[0]", num_sources)
    batch_size, num_heads, num_tokens = tensors[0].shape[:3]
    shape = (batch_size, (num_heads, 1), num_tokens)
    check.companion(weight, "weight", torch.float32, shape, tensors[0], "tensors[0]")
