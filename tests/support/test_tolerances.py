"""The assertion helpers: they let through what they should, and nothing else."""

from __future__ import annotations

import pytest
import torch

from kvevict import reference
from tests.support.checks import assert_same_bytes
from tests.support.tolerances import (
    assert_rotated_close,
    assert_scores_close,
    in_input_precision,
)

EXPECTED = torch.tensor([1.0, 1e-3, 1e-9, 0.0], dtype=torch.float64)


def off_by(relative: float, absolute: float = 0.0) -> torch.Tensor:
    return (EXPECTED * (1 + relative) + absolute).float()


def test_rule_of_relative_error() -> None:
    assert_scores_close(off_by(0), EXPECTED)
    assert_scores_close(off_by(9e-6), EXPECTED)
    assert_scores_close(off_by(0, 1e-7), EXPECTED)
    for wrong in (off_by(2e-5), off_by(-2e-5), off_by(0, 2e-7)):
        with pytest.raises(AssertionError, match="is allowed"):
            assert_scores_close(wrong, EXPECTED)


def test_rule_of_twice_the_plain_error() -> None:
    plain = off_by(0, 1e-3).double()
    assert_scores_close(off_by(0, 1.9e-3), EXPECTED, plain)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_scores_close(off_by(0, 2.1e-3), EXPECTED, plain)
    # A perfect plain result leaves only the rounding of float32.
    assert_scores_close(off_by(0, 1e-7), EXPECTED, EXPECTED)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_scores_close(off_by(0, 2e-7), EXPECTED, EXPECTED)


def test_rule_of_terms_that_cancel() -> None:
    assert_scores_close(off_by(0, 1.9e-6), EXPECTED, terms=2.0)
    for wrong, terms in ((off_by(0, 2.2e-6), 2.0), (off_by(0, 1.9e-6), 1.0)):
        with pytest.raises(AssertionError, match="is allowed"):
            assert_scores_close(wrong, EXPECTED, terms=terms)


@pytest.mark.parametrize("plain", [None, EXPECTED], ids=["relative", "twice_plain"])
def test_one_wrong_element_is_enough(plain: torch.Tensor | None) -> None:
    for place in range(4):
        for wrong in (0.5, torch.nan, torch.inf):
            actual = off_by(0)
            actual[place] = wrong
            with pytest.raises(AssertionError):
                assert_scores_close(actual, EXPECTED, plain)


def test_infinity_and_nan_must_stand_where_expected() -> None:
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=torch.float64)
    assert_scores_close(expected.float(), expected)
    for place in range(3):
        for wrong in (0.0, 3e38, -torch.inf if place != 1 else torch.inf):
            actual = expected.float()
            actual[place] = wrong
            with pytest.raises(AssertionError):
                assert_scores_close(actual, expected)


def test_shape_and_dtype_matter() -> None:
    with pytest.raises(AssertionError):
        assert_scores_close(off_by(0)[None], EXPECTED)
    with pytest.raises(AssertionError):
        assert_scores_close(EXPECTED, EXPECTED)
    assert_scores_close(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_torch_runs_in_the_precision_of_the_inputs(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 2, 5, 16).to(dtype), torch.randn(1, 2, 9, 16).to(dtype)
    plain = in_input_precision(reference.attention_lse, query, key)
    exact = reference.attention_lse(query, key)
    assert plain.dtype == dtype and exact.dtype == torch.float64
    error = float((plain.double() - exact).abs().max())
    assert 0 < error < 20 * torch.finfo(dtype).eps
    assert torch.Tensor.double(query).dtype == torch.float64  # nothing is left behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotated_keys_are_rounded_once(dtype: torch.dtype) -> None:
    exact = torch.tensor([[1.0, 0.3, -1e-3, 0.0]], dtype=torch.float64)
    assert_rotated_close(exact.to(dtype), exact)
    assert_rotated_close((exact + 0.9e-6).to(dtype), exact)
    for place in range(4):
        wrong = exact.to(dtype)
        step = max(float(exact[0, place].abs()) * torch.finfo(dtype).eps, 2e-6)
        wrong[0, place] += 1.5 * step
        with pytest.raises(AssertionError, match="is allowed"):
            assert_rotated_close(wrong, exact)
    with pytest.raises(AssertionError):
        assert_rotated_close(torch.full_like(exact, torch.nan).to(dtype), exact)


def test_same_bytes_sees_every_bit() -> None:
    value = torch.tensor([0.0, torch.nan])
    assert_same_bytes([value, None], [value.clone(), None])
    for other in (torch.tensor([-0.0, torch.nan]), value.double(), value[None], value[:1]):
        with pytest.raises(AssertionError):
            assert_same_bytes(value, other)
    with pytest.raises(AssertionError):
        assert_same_bytes([value], [value, value])
    with pytest.raises(AssertionError):
        assert_same_bytes((value, None), (None, value))
