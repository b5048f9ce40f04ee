"""The thresholds against Python's own numbers, and the order of the sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvevict import reference
from kvevict.reference.select_threshold import add_up, compute_threshold
from tests.reference.naive import ranking

# Multiples of 1/8: their sums and the thresholds are exact.
EIGHTHS = st.integers(-4, 16).map(lambda n: n / 8)
SCORE = st.one_of(EIGHTHS, EIGHTHS, st.sampled_from([math.nan, math.inf, -math.inf, -0.0]))
KEY = st.tuples(SCORE, SCORE, st.booleans(), st.sampled_from([True, True, True, False]))


def select(keys: list[tuple[Any, ...]], **arguments: Any) -> tuple[list[int], int]:
    """Select from keys of (sum, maximum, candidate, real)."""
    columns = list(zip(*keys, strict=True)) or [(), (), (), ()]
    statistics = [
        torch.tensor(column, dtype=torch.float32).view(1, 1, -1) for column in columns[:2]
    ]
    flags = [torch.tensor(column, dtype=torch.bool).view(1, -1) for column in columns[2:]]
    kept_indices, kept_lens = reference.select_threshold(
        *statistics, flags[0], key_mask=flags[1], **arguments
    )
    assert kept_indices.dtype == kept_lens.dtype == torch.int32
    return kept_indices[0, 0].tolist(), int(kept_lens)


@given(
    keys=st.lists(KEY, max_size=12),
    factor=st.integers(0, 8).map(lambda n: n / 8),
    per_candidate=st.booleans(),
    max_evicted=st.one_of(st.none(), st.integers(0, 12)),
)
def test_decision(
    keys: list[tuple[Any, ...]], factor: float, per_candidate: bool, max_evicted: int | None
) -> None:
    chosen = [key[0] for key in keys if key[2] and key[3]]
    count = len(chosen)
    if per_candidate and count & (count - 1):  # the division would round
        keys = keys + [(0.0, 2.0, True, True)] * ((1 << count.bit_length()) - count)
        count = 1 << count.bit_length()
    total = sum(chosen) if not any(math.isnan(x) for x in chosen) else math.nan
    scaled = factor / max(count, 1) if per_candidate else factor
    threshold = math.nan if scaled == 0 and math.isinf(total) else scaled * total
    evictable = [
        j
        for j, (s, m, candidate, real) in enumerate(keys)
        if candidate and real and s < threshold and m < 1.0
    ]
    worst_first = [j for j in reversed(ranking([key[0] for key in keys], [1] * len(keys)))]
    evicted = [j for j in worst_first if j in evictable][:max_evicted]
    expected = [j for j, key in enumerate(keys) if key[3] and j not in evicted]
    padding = [-1] * (len(keys) - len(expected))
    name = "kappa" if per_candidate else "ratio"
    actual = select(keys, **{name: factor}, alpha=1.0, max_evicted=max_evicted)
    assert actual == (expected + padding, len(expected))


def test_order_of_the_sum() -> None:
    """Large numbers cancel, and 1 survives if they meet before it comes to one of them."""
    for place, total in ((35, 1.0), (19, 1.0), (4, 0.0), (8, 0.0)):
        values = torch.zeros(100)
        values[3], values[40] = 1e8, 1.0  # lanes 3 and 8
        values[place] -= 1e8
        assert float(add_up(values)) == total


def test_the_sum_is_close() -> None:
    sums = torch.rand(2, 1, 5000)
    candidates = torch.rand(2, 1, 5000) < 0.5
    expected = 0.3 * sums.double().where(candidates, 0).sum(-1, keepdim=True)
    actual = compute_threshold(sums, candidates, 0.3, None)
    torch.testing.assert_close(actual.double(), expected, rtol=3e-7, atol=0)
