"""select_topk: indices are exact, on every pattern and around every pivot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes
from tests.support.patterns import PATTERNS

OP = "select_topk"
KV_LENS = (1, 15, 64, 65, 1000, 4097)


def budgets(kv_len: int) -> list[int]:
    """Return the budgets that cut at an edge, in the middle, and beyond the end."""
    return sorted({0, 1, kv_len // 20, kv_len // 2, kv_len - 1, kv_len, kv_len + 3})


def assert_exact(
    backend: Backend,
    scores: Tensor,
    k: int,
    row_k: Tensor | None = None,
    priority: Tensor | None = None,
) -> None:
    """Compare with the oracle, which runs on the CPU."""
    expected = reference.select_topk(scores, k, row_k=row_k, priority=priority)
    scores, row_k, priority = (
        None if tensor is None else tensor.to(backend.device)
        for tensor in (scores, row_k, priority)
    )
    actual = backend.op(OP)(scores, k, row_k=row_k, priority=priority)
    assert_same_bytes(actual, expected, f"k = {k}")


@pytest.mark.every_isa
@pytest.mark.parametrize("kv_len", KV_LENS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(backend: Backend, pattern: str, kv_len: int) -> None:
    scores = PATTERNS[pattern]((2, 3, kv_len))
    for k in budgets(kv_len):
        assert_exact(backend, scores, k)


@pytest.mark.every_isa
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pattern", ["random", "ties_at_pivot", "inf"])
def test_priority(backend: Backend, pattern: str, per_head: bool) -> None:
    """A higher class wins over any score; class 0 is never kept; all 256 values are classes."""
    kv_len = 500
    scores = PATTERNS[pattern]((2, 3, kv_len))
    size = (2, 3, kv_len) if per_head else (2, kv_len)
    for classes in (2, 4, 256):
        priority = torch.randint(0, classes, size, dtype=torch.uint8)
        for k in budgets(kv_len):
            assert_exact(backend, scores, k, priority=priority)


@pytest.mark.parametrize("classes", [(0,), (1,), (255,), (0, 255), (1, 2)])
def test_priority_of_few_classes(backend: Backend, classes: tuple[int, ...]) -> None:
    choice = torch.tensor(classes, dtype=torch.uint8)
    priority = choice[torch.randint(0, len(classes), (2, 70))]
    for k in budgets(70):
        assert_exact(backend, torch.randn(2, 3, 70), k, priority=priority)


@pytest.mark.parametrize("with_priority", [False, True])
def test_ragged_budgets(backend: Backend, with_priority: bool) -> None:
    scores = PATTERNS["ties_at_pivot"]((4, 5, 130))
    row_k = torch.randint(0, 91, (4, 5), dtype=torch.int32)
    row_k[0, 0], row_k[1, 1] = 0, 90
    priority = torch.randint(0, 3, (4, 130), dtype=torch.uint8) if with_priority else None
    assert_exact(backend, scores, 90, row_k, priority)


@pytest.mark.parametrize("size", [(0, 2, 8), (2, 0, 8), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("k", [0, 4])
def test_empty(backend: Backend, size: tuple[int, ...], k: int) -> None:
    assert_exact(backend, torch.zeros(size), k)


def test_one_list_of_many_keys(backend: Backend) -> None:
    """Long enough that one list is shared out, should a backend do that."""
    scores = PATTERNS["ties_at_pivot"]((1, 1, 70_001))
    for k in (1, 3500, 69_999):
        assert_exact(backend, scores, k)


@pytest.mark.parametrize("classes", [3, 256])
def test_priority_of_many_keys(backend: Backend, classes: int) -> None:
    """The same lists as of few keys, each shared out."""
    kv_len = 50_003
    scores = PATTERNS["ties_at_pivot"]((2, 2, kv_len))
    priority = torch.randint(0, classes, (2, kv_len), dtype=torch.uint8)
    row_k = torch.tensor([[0, 300], [20_000, 45_000]], dtype=torch.int32)
    assert_exact(backend, scores, 45_000, row_k, priority)


@pytest.mark.parametrize("per_head", [False, True])
def test_lists_of_many_keys_with_priority(backend: Backend, per_head: bool) -> None:
    """Lists that are shared out, too; one of them keeps nothing."""
    kv_len = 66_001
    scores = PATTERNS["ties_at_pivot"]((1, 2, kv_len))
    size = (1, 2, kv_len) if per_head else (1, kv_len)
    priority = torch.randint(0, 4, size, dtype=torch.uint8)
    row_k = torch.tensor([[0, 20_000]], dtype=torch.int32)
    for k in (20_000, 60_000):
        assert_exact(backend, scores, k, row_k, priority)


def test_many_short_lists(backend: Backend) -> None:
    assert_exact(backend, PATTERNS["two_values"]((37, 11, 9)), 4)


def test_scores_that_differ_in_the_last_bit(backend: Backend) -> None:
    bits = torch.tensor(1.0).view(torch.int32) + torch.randperm(300, dtype=torch.int32)
    scores = bits.view(torch.float32).view(1, 1, 300) * torch.tensor([[[1.0], [-1.0]]])
    for k in (1, 77, 299):
        assert_exact(backend, scores, k)
