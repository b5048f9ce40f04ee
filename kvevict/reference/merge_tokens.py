"""Oracle of `kvevict.merge_tokens_`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def merge_tokens_(
    tensors: Sequence[Tensor],
    source_index: Tensor,
    match_index: Tensor,
    weight: Tensor,
    *,
    normalize: bool = True,
) -> None:
    """Merge sources into their targets, in place; sums in float64."""
    batch_size, num_heads, num_tokens, _ = tensors[0].shape
    source_index = source_index.expand(batch_size, num_heads, -1)
    match_index = match_index.expand(batch_size, num_heads, -1)
    weight = weight.expand(batch_size, num_heads, num_tokens)
    for b in range(batch_size):
        for h in range(num_heads):
            pairs = zip(source_index[b, h].tolist(), match_index[b, h].tolist(), strict=True)
            for target, group in group_by_target(pairs).items():
                weights = weight[b, h, group].double()
                divisor = weights.sum() if normalize else 1.0
                if normalize and divisor <= 1e-8:
                    weights, divisor = weights.new_ones(len(group)), float(len(group))
                for tensor in tensors:
                    rows = tensor[b, h, group].double()
                    tensor[b, h, target] = (weights[:, None] * rows).sum(0) / divisor


def group_by_target(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Return for every target itself and its sources, in order; pairs with a -1 are left out."""
    groups: dict[int, list[int]] = {}
    for source, target in pairs:
        if source >= 0 and target >= 0:
            groups.setdefault(target, [target]).append(source)
    return groups
