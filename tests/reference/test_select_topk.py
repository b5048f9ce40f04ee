"""The total order and the selection against Python's own sort."""

from __future__ import annotations

import math
import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvevict import reference
from tests.reference.naive import ranking

# Few distinct values, so that ties are common.
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45]
SCORE = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
KEYS = st.lists(st.tuples(SCORE, st.integers(0, 3)), max_size=12)


def select(
    scores: list[float], priority: list[int], k: int, row_k: int | None = None
) -> tuple[list[int], int]:
    kept_indices, kept_lens = reference.select_topk(
        torch.tensor(scores, dtype=torch.float32).view(1, 1, -1),
        k,
        row_k=None if row_k is None else torch.tensor([[row_k]], dtype=torch.int32),
        priority=torch.tensor(priority, dtype=torch.uint8).view(1, -1),
    )
    assert kept_indices.dtype == kept_lens.dtype == torch.int32
    return kept_indices[0, 0].tolist(), int(kept_lens)


@given(keys=KEYS, k=st.integers(0, 14), data=st.data())
def test_selection_is_the_head_of_the_ranking(
    keys: list[tuple[float, int]], k: int, data: st.DataObject
) -> None:
    scores, priority = [key[0] for key in keys], [key[1] for key in keys]
    row_k = data.draw(st.one_of(st.none(), st.integers(0, k)))
    wanted = k if row_k is None else row_k
    best = [j for j in ranking(scores, priority) if priority[j] > 0][:wanted]
    expected = sorted(best) + [-1] * (k - len(best))
    assert select(scores, priority, k, row_k) == (expected, len(best))


@given(keys=KEYS, k=st.integers(0, 12))
def test_a_larger_k_keeps_what_a_smaller_one_kept(keys: list[tuple[float, int]], k: int) -> None:
    scores, priority = [key[0] for key in keys], [key[1] for key in keys]
    smaller, count = select(scores, priority, k)
    larger, _ = select(scores, priority, k + 1)
    assert set(smaller[:count]) <= set(larger)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8, unique=True))
def test_without_ties_it_is_torch_topk(scores: list[float]) -> None:
    k = (len(scores) + 1) // 2
    expected = torch.tensor(scores, dtype=torch.float32).topk(k).indices.sort().values
    assert select(scores, [1] * len(scores), k)[0] == expected.tolist()


def test_every_nan_is_one_value_below_minus_infinity() -> None:
    bits = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800000]  # three NaN, then -inf
    scores = torch.tensor([struct.unpack("i", struct.pack("I", b))[0] for b in bits])
    scores = scores.int().view(torch.float32).view(1, 1, 4)
    assert reference.select_topk(scores, 1)[0].tolist() == [[[3]]]
    assert reference.select_topk(scores, 2)[0].tolist() == [[[0, 3]]]


def test_priority_per_head_and_shared() -> None:
    scores = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]])
    shared = torch.tensor([[1, 1, 2, 0]], dtype=torch.uint8)
    assert reference.select_topk(scores, 2, priority=shared)[0].tolist() == [[[0, 2], [1, 2]]]
    per_head = torch.tensor([[[0, 1, 1, 2], [3, 0, 0, 0]]], dtype=torch.uint8)
    kept_indices, kept_lens = reference.select_topk(scores, 2, priority=per_head)
    assert kept_indices.tolist() == [[[1, 3], [0, -1]]]
    assert kept_lens.tolist() == [[2, 1]]
