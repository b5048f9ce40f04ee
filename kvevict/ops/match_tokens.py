"""The most similar target of each source token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import ANY, Check, check_token_lists
from kvevict.ops._fake import register_fake
from kvevict.ops.enums import Metric


def match_tokens(
    tokens: Tensor,
    source_index: Tensor,
    target_index: Tensor,
    *,
    source_group: Tensor | None = None,
    target_group: Tensor | None = None,
    metric: int = Metric.COSINE,
) -> tuple[Tensor, Tensor]:
    """Finds for every source token the target token of its group that is most similar to it.

    The assignment of merging methods: LightKV's windowed bipartite matching of hidden states
    (arXiv 2605.00789), the nearest kept key of an evicted one in D2O and LOOK-M, ZSMerge's residual
    slot of largest dot product. The matrix of similarities never exists.

    With ``x_a`` and ``x_b`` two tokens, ``COSINE`` is ``x_a . x_b / (||x_a|| * ||x_b|| + 1e-8)``
    and ``DOT`` is ``x_a . x_b``, accumulated in float32; norms may go up to 1e9. Of equal
    similarities the first in target_index wins; NaN counts as -inf.

    Args:
        tokens: [batch_size, num_heads, num_tokens, dim] float32, float16 or bfloat16, any strides
            with a contiguous last dimension; dim any multiple of 8: keys or values of a layer, or
            hidden states with num_heads 1.
        source_index: [batch_size, num_heads | 1, num_sources] int32, positions of tokens; -1,
            anywhere, for none. One list may serve all heads.
        target_index: [batch_size, num_heads | 1, num_targets] int32, positions of tokens or -1.
        source_group: source_index's shape, int32, at least 0 and not descending over the sources
            that there are: a source meets only the targets of its own group. None, together with
            target_group, for one group.
        target_group: target_index's shape, int32, as source_group.
        metric: a :class:`Metric`.

    Returns:
        match_index [batch_size, num_heads, num_sources] int32, the position of the target, and
        similarity, float32 of that shape; -1 and -inf where there is no source or no target of its
        group.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of the indices and
            groups are checked on the CPU only; on CUDA a position that is not one of tokens counts
            as -1, and groups need no order.

    O(num_heads * num_sources * num_targets * dim) time, with num_targets those of a source's group.
    Extra memory: per thread a few hundred packed sources (1 MB) on the CPU, two floats per source
    and target and up to 16 partial results per source on CUDA.
    """
    results: tuple[Tensor, Tensor] = torch.ops.kvevict.match_tokens(
        tokens,
        source_index,
        target_index,
        source_group=source_group,
        target_group=target_group,
        metric=metric,
    )
    return results


@register_fake("match_tokens")
def _(
    tokens: Tensor,
    source_index: Tensor,
    target_index: Tensor,
    *,
    source_group: Tensor | None = None,
    target_group: Tensor | None = None,
    metric: int = 0,
) -> tuple[Tensor, Tensor]:
    check = Check("match_tokens")
    check.dtype(tokens, "tokens", torch.float32, torch.float16, torch.bfloat16)
    check.shape(tokens, "tokens", ANY, ANY, ANY, ANY)
    check.contiguous_last_dim(tokens, "tokens")
    batch_size, num_heads, _, dim = tokens.shape
    if dim < 8 or dim % 8 != 0:
        check.fail("tokens", "have a dim that is a multiple of 8", dim)
    check_token_lists(check, source_index, "source_index", tokens, "tokens")
    check_token_lists(check, target_index, "target_index", tokens, "tokens")
    if source_group is None and target_group is not None:
        check.fail("source_group", "be given as target_group is", None)
    if source_group is not None and target_group is None:
        check.fail("target_group", "be given as source_group is", None)
    for group, name, index in (
        (source_group, "source_group", source_index),
        (target_group, "target_group", target_index),
    ):
        if group is not None:
            check.companion(group, name, torch.int32, index.shape, tokens, "tokens")
    check.one_of(metric, "metric", ("COSINE", "DOT"))
    shape = (batch_size, num_heads, source_index.shape[2])
    return (
        tokens.new_empty(shape, dtype=torch.int32),
        tokens.new_empty(shape, dtype=torch.float32),
    )
