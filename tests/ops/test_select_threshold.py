"""select_threshold: indices are exact, the threshold is one number on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.reference.select_threshold import compute_threshold
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, clone
from tests.support.patterns import PATTERNS
from tests.support.worked_examples import (
    HAE_ATTENTION,
    HAE_CANDIDATES,
    HAE_DECISIONS,
    query_of_heads,
)

OP = "select_threshold"
KV_LENS = (1, 15, 64, 65, 1000, 1024, 4097)


def assert_exact(backend: Backend, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Compare with the oracle, which runs on the CPU; return its results."""
    expected = reference.select_threshold(**arguments)
    on_device = {
        name: value.to(backend.device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    assert_same_bytes(backend.op(OP)(**on_device), expected)
    return expected


def limits(kv_len: int) -> list[int | None]:
    """Return limits that spare all, most, some and none of what may be evicted."""
    return [None, 0, 1, kv_len // 3, kv_len]


@pytest.mark.every_isa
@pytest.mark.parametrize("kv_len", KV_LENS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(backend: Backend, pattern: str, kv_len: int) -> None:
    sums, maxima = PATTERNS[pattern]((2, 3, kv_len)), torch.rand(2, 3, kv_len)
    candidates = torch.rand(2, kv_len) < 0.8
    for max_evicted in limits(kv_len):
        for factor in ({"ratio": 0.6}, {"kappa": 0.9}):
            assert_exact(
                backend,
                sums=sums,
                maxima=maxima,
                candidates=candidates,
                alpha=0.7,
                max_evicted=max_evicted,
                **factor,
            )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_of_maxima(backend: Backend, pattern: str) -> None:
    assert_exact(
        backend,
        sums=torch.rand(2, 3, 300),
        maxima=PATTERNS[pattern]((2, 3, 300)),
        candidates=torch.ones(2, 300, dtype=torch.bool),
        kappa=1.2,
        alpha=0.5,
        max_evicted=100,
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("real", [0.0, 0.7, 1.0])
def test_padding_and_candidates(backend: Backend, share: float, real: float) -> None:
    """Padding that is called a candidate counts for nothing: neither in the total nor in n."""
    arguments = {
        "sums": torch.rand(3, 2, 500),
        "maxima": torch.rand(3, 2, 500),
        "candidates": torch.rand(3, 500) < share,
        "key_mask": torch.rand(3, 500) < real,
        "alpha": 0.8,
    }
    for kappa in (0.0, 0.86, 3.0):
        expected = assert_exact(backend, kappa=kappa, **arguments)
        masked = clone(arguments)
        masked["sums"].masked_fill_(~arguments["key_mask"][:, None], torch.nan)
        assert_same_bytes(assert_exact(backend, kappa=kappa, **masked), expected)


@pytest.mark.parametrize("size", [(0, 2, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(backend: Backend, size: tuple[int, ...]) -> None:
    candidates = torch.ones(size[0], size[2], dtype=torch.bool)
    assert_exact(
        backend,
        sums=torch.zeros(size),
        maxima=torch.zeros(size),
        candidates=candidates,
        ratio=0.5,
        alpha=1.0,
    )


@pytest.mark.parametrize("max_evicted", [None, 20_000])
def test_many_keys(backend: Backend, max_evicted: int | None) -> None:
    """More segments than lanes, and more keys than one block takes, should a backend do that."""
    assert_exact(
        backend,
        sums=PATTERNS["ties_at_pivot"]((1, 2, 70_001)).abs(),
        maxima=torch.rand(1, 2, 70_001),
        candidates=torch.rand(1, 70_001) < 0.9,
        kappa=1.0,
        alpha=0.8,
        max_evicted=max_evicted,
    )


@pytest.mark.every_isa
@pytest.mark.parametrize(("num_heads", "kv_len"), [(8, 1500), (2, 40_000)])
def test_the_total_has_one_order(backend: Backend, num_heads: int, kv_len: int) -> None:
    """Sums that cancel, and candidates at each of the floats next to the threshold."""
    sums, candidates = torch.randn(1, num_heads, kv_len), torch.ones(1, kv_len, dtype=torch.bool)
    steps = torch.arange(-512, 512, dtype=torch.int32)
    for _ in range(12):  # the total moves with the candidates that are put next to it
        threshold = compute_threshold(sums, candidates[:, None], None, 0.3)
        sums[..., -len(steps) :] = (threshold.view(torch.int32) + steps).view(torch.float32)
    kept_indices, _ = assert_exact(
        backend,
        sums=sums,
        maxima=torch.zeros_like(sums),
        candidates=candidates,
        kappa=0.3,
        alpha=1.0,
    )
    num_kept = (kept_indices >= kv_len - len(steps)).sum(-1)
    assert ((num_kept > 0) & (num_kept < len(steps))).all()


def test_ties_keep_the_lower_index(backend: Backend) -> None:
    sums = torch.tensor([[[0.5, 0.1, 0.2, 0.1, 0.1, 0.2, 0.5]]])
    ones = torch.ones(1, 7, dtype=torch.bool)
    for max_evicted, kept in ((1, [0, 1, 2, 3, 5, 6]), (2, [0, 1, 2, 5, 6]), (4, [0, 2, 6])):
        kept_indices, _ = assert_exact(
            backend,
            sums=sums,
            maxima=torch.zeros_like(sums),
            candidates=ones,
            ratio=0.25,
            alpha=1.0,
            max_evicted=max_evicted,
        )
        assert kept_indices[0, 0, : len(kept)].tolist() == kept


def test_nan_is_never_evicted(backend: Backend) -> None:
    sums, maxima = torch.full((1, 3, 40), 0.1), torch.zeros(1, 3, 40)
    candidates = torch.ones(1, 40, dtype=torch.bool)
    candidates[0, 0] = False
    sums[0, 0, 0] = torch.nan  # of no candidate: the row goes on
    sums[0, 1, 7] = torch.nan  # the total is NaN
    maxima[0, 2, 9] = torch.nan
    kept_indices, kept_lens = assert_exact(
        backend, sums=sums, maxima=maxima, candidates=candidates, ratio=0.5, alpha=1.0
    )
    assert kept_lens.tolist() == [[1, 40, 2]]
    assert kept_indices[0, 2, :2].tolist() == [0, 9]


@pytest.mark.parametrize("factor", [{"ratio": 0.0}, {"kappa": 0.0}], ids=str)
def test_a_threshold_of_0_keeps_all(backend: Backend, factor: dict[str, float]) -> None:
    sums = torch.rand(2, 2, 50)
    sums[..., ::3] = 0
    candidates = torch.ones(2, 50, dtype=torch.bool)
    _, kept_lens = assert_exact(
        backend, sums=sums, maxima=sums, candidates=candidates, alpha=2.0, **factor
    )
    assert (kept_lens == 50).all()


@pytest.mark.parametrize("decision", HAE_DECISIONS, ids=str)
def test_dual_attention_pruning(backend: Backend, decision: tuple[Any, ...]) -> None:
    """The worked example from query and key on: two statistics, then the decision."""
    ratio, alpha, max_evicted, kept = decision
    query, key = (t.to(backend.device, torch.float32) for t in query_of_heads(HAE_ATTENTION))
    sums, maxima = (
        backend.op("score_keys")(
            query,
            key,
            sm_scale=1.0,
            statistic=statistic,
            head_reduction=HeadReduction.ALL_MEAN,
        )
        for statistic in (Statistic.SUM, Statistic.MAX)
    )
    kept_indices, kept_lens = backend.op(OP)(
        sums,
        maxima,
        HAE_CANDIDATES.to(backend.device),
        ratio=ratio,
        alpha=alpha,
        max_evicted=max_evicted,
    )
    assert kept_indices[0, 0, : int(kept_lens)].tolist() == kept
