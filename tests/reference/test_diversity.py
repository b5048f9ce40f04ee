"""key_diversity and mix_scores against nested loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import DiversityReference

BATCH_SIZE, NUM_HEADS, KV_LEN, HEAD_DIM = 2, 2, 7, 8
HEADS = list(itertools.product(range(BATCH_SIZE), range(NUM_HEADS)))


def make_key() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(BATCH_SIZE, NUM_HEADS, KV_LEN, HEAD_DIM, generator=generator) + 0.3
    key[0, 0, 2] = 0.0
    key_mask = torch.ones(BATCH_SIZE, KV_LEN, dtype=torch.bool)
    key_mask[1, :3] = False
    return key, key_mask


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors, 0 if one of them is 0."""
    norm = math.sqrt(float(a.double() @ a.double()) * float(b.double() @ b.double()))
    return float(a.double() @ b.double()) / norm if norm else 0.0


@pytest.mark.parametrize("masked", [True, False])
def test_key_diversity_is_the_mean_over_all_pairs(masked: bool) -> None:
    key, key_mask = make_key()
    key[0, 0, 2] = key[0, 0, 1]  # the formula counts 1 for a key with itself, 0 for a zero vector
    similarity, redundancy = reference.key_diversity(key, key_mask=key_mask if masked else None)
    for b, h in HEADS:
        real = [j for j in range(KV_LEN) if not masked or key_mask[b, j]]
        pairs = {(i, j): cosine(key[b, h, i], key[b, h, j]) for i in real for j in real}
        for j in range(KV_LEN):
            expected = sum(pairs[i, j] for i in real) / len(real) if j in real else 0.0
            assert float(similarity[b, h, j]) == pytest.approx(expected, abs=1e-12)
        others = [value for (i, j), value in pairs.items() if i != j]
        expected = min(max(sum(others) / len(others), 0), 1)
        assert float(redundancy[b, h]) == pytest.approx(expected, abs=1e-12)


def test_key_diversity_of_zero_vectors_and_of_few_keys() -> None:
    key, key_mask = make_key()
    assert reference.key_diversity(key)[0][0, 0, 2] == 0
    for real in (0, 1):
        key_mask[:] = torch.arange(KV_LEN) < real
        similarity, redundancy = reference.key_diversity(key, key_mask=key_mask)
        torch.testing.assert_close(similarity.sum(-1), torch.full_like(redundancy, real))
        assert redundancy.count_nonzero() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2e19])
def test_key_diversity_of_a_key_without_a_norm(value: float) -> None:
    key, key_mask = make_key()
    key[1, 0, :4, 5] = value
    similarity, redundancy = reference.key_diversity(key, key_mask=key_mask)
    assert similarity[1, 0, 3:].isnan().all() and redundancy[1, 0].isnan()
    assert int(similarity.isnan().sum()) == KV_LEN - 3 and int(redundancy.isnan().sum()) == 1


def naive_mix(
    scores: list[float],
    similarity: list[float],
    value_norm: list[float],
    r: float,
    reference_mean: DiversityReference,
) -> list[float]:
    """Mix the scores of one row of candidates."""

    def unit(values: list[float]) -> list[float]:
        spread = max(values) - min(values) + 1e-8
        return [(x - min(values)) / spread for x in values]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    v, d = unit(value_norm), unit([-x for x in similarity])
    importance = [s + x * mean(scores) / (mean(v) + 1e-8) for s, x in zip(scores, v, strict=True)]
    wanted = mean(scores if reference_mean == DiversityReference.ATTENTION else importance)
    scaled = [x * wanted / (mean(d) + 1e-8) for x in d]
    return [r * x + (1 - r) * y for x, y in zip(scaled, importance, strict=True)]


@pytest.mark.parametrize("reference_mean", list(DiversityReference))
@pytest.mark.parametrize("priority_dim", [None, 2, 3])
def test_mix_scores(reference_mean: DiversityReference, priority_dim: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    size = (BATCH_SIZE, NUM_HEADS, KV_LEN)
    scores, similarity, value_norm = torch.rand(3, *size, generator=generator)
    redundancy = torch.rand(size[:2], generator=generator)
    priority = torch.randint(0, 3, size, generator=generator, dtype=torch.uint8)
    priority[1, 0] = 2
    if priority_dim != 3:
        priority[:] = priority[:, 1:].clone() if priority_dim == 2 else 1
    given = {None: None, 2: priority[:, 0], 3: priority}[priority_dim]
    mixed = reference.mix_scores(
        scores,
        similarity,
        value_norm,
        redundancy,
        priority=given,
        diversity_reference=reference_mean,
    )
    for b, h in HEADS:
        row = [j for j in range(KV_LEN) if priority[b, h, j] == 1]
        expected = scores[b, h].tolist()
        if row:
            columns = [x[b, h, row].tolist() for x in (scores, similarity, value_norm)]
            new = naive_mix(*columns, float(redundancy[b, h]), reference_mean)
            for j, value in zip(row, new, strict=True):
                expected[j] = value
        assert mixed[b, h].tolist() == pytest.approx(expected, rel=1e-6)
