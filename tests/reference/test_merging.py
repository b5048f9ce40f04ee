"""match_tokens and merge_tokens_ against loops over pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import Metric

BATCH_SIZE, NUM_HEADS, NUM_TOKENS, NUM_SOURCES, NUM_TARGETS = 2, 3, 12, 7, 5
PLACES = list(itertools.product(range(BATCH_SIZE), range(NUM_HEADS)))
# Few distinct values: many ties, and NaN for 0 * inf.
VALUES = [0.0, 1.0, -1.0, 2.0, math.inf, math.nan]


def make_list(length: int, heads: int) -> Tensor:
    return torch.randint(-1, NUM_TOKENS, (BATCH_SIZE, heads, length), dtype=torch.int32)


def list_of(lists: Tensor, b: int, h: int) -> list[int]:
    entries: list[int] = lists[b, h if lists.shape[1] > 1 else 0].tolist()
    return entries


def similarity_of(x: list[float], y: list[float], metric: int) -> float:
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    if metric == Metric.DOT:
        return dot
    return dot / (math.sqrt(sum(p * p for p in x)) * math.sqrt(sum(q * q for q in y)) + 1e-8)


def rank(similarity: float) -> float:
    return -math.inf if math.isnan(similarity) else similarity


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("heads", [1, NUM_HEADS])
@pytest.mark.parametrize("with_groups", [False, True])
def test_match(metric: int, heads: int, with_groups: bool) -> None:
    choice = torch.randint(len(VALUES), (BATCH_SIZE, NUM_HEADS, NUM_TOKENS, 1))
    tokens = torch.tensor(VALUES)[choice].repeat(1, 1, 1, 8)
    tokens[..., ::2] *= -1
    sources, targets = make_list(NUM_SOURCES, heads), make_list(NUM_TARGETS, heads)
    groups = {}
    if with_groups:
        for name, lists in (("source_group", sources), ("target_group", targets)):
            groups[name] = torch.randint(3, lists.shape).sort(-1).values.int()
    match_index, similarity = reference.match_tokens(
        tokens, sources, targets, metric=metric, **groups
    )
    assert match_index.dtype == torch.int32 and similarity.dtype == torch.float64

    for b, h in PLACES:
        group_lists = [list_of(groups[name], b, h) for name in groups] or [[0] * 9, [0] * 9]
        for s, source in enumerate(list_of(sources, b, h)):
            best, best_similarity = -1, -math.inf
            for t, target in enumerate(list_of(targets, b, h)):
                if source < 0 or target < 0 or group_lists[0][s] != group_lists[1][t]:
                    continue
                x, y = tokens[b, h, source].tolist(), tokens[b, h, target].tolist()
                value = similarity_of(x, y, metric)
                if best < 0 or rank(value) > rank(best_similarity):
                    best, best_similarity = target, value
            assert int(match_index[b, h, s]) == best
            assert float(similarity[b, h, s]) == pytest.approx(best_similarity, nan_ok=True)


def test_no_targets() -> None:
    nothing = torch.zeros(BATCH_SIZE, 1, 0, dtype=torch.int32)
    tokens = torch.zeros(BATCH_SIZE, NUM_HEADS, NUM_TOKENS, 8)
    match_index, similarity = reference.match_tokens(tokens, make_list(4, 1), nothing)
    assert match_index.tolist() == [[[-1] * 4] * NUM_HEADS] * BATCH_SIZE
    assert (similarity == -torch.inf).all()
    match_index, _ = reference.match_tokens(tokens, nothing, make_list(4, 1))
    assert match_index.shape == (BATCH_SIZE, NUM_HEADS, 0)


@pytest.mark.parametrize("heads", [1, NUM_HEADS])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weightless", [False, True])
def test_merge(heads: int, normalize: bool, weightless: bool) -> None:
    sources, match_index = (make_list(NUM_SOURCES, heads) // 2 * 2 + kind for kind in (0, 1))
    sources[sources < 0] = -1
    match_index[:, :, -1] = -1
    weight = torch.rand(BATCH_SIZE, 1, NUM_TOKENS)
    if weightless:
        weight.fill_(-0.25)
    tensors = [torch.randn(BATCH_SIZE, NUM_HEADS, NUM_TOKENS, dim).double() for dim in (3, 8)]
    merged = [tensor.clone() for tensor in tensors]
    reference.merge_tokens_(merged, sources, match_index, weight, normalize=normalize)

    for b, h in PLACES:
        for target in range(NUM_TOKENS):
            pairs = zip(list_of(sources, b, h), list_of(match_index, b, h), strict=True)
            group = [target, *(s for s, t in pairs if s >= 0 and t == target)]
            weights = [float(weight[b, 0, token]) for token in group]
            divisor = 1.0
            if normalize:
                divisor = sum(weights)
                if divisor <= 1e-8:
                    weights, divisor = [1.0] * len(group), float(len(group))
            if len(group) == 1:
                weights, divisor = [1.0], 1.0
            for old, new in zip(tensors, merged, strict=True):
                expected = sum(w * old[b, h, t] for w, t in zip(weights, group, strict=True))
                torch.testing.assert_close(new[b, h, target], expected / divisor)
