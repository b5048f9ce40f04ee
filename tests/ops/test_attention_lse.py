"""attention_lse against its oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import shapes
from tests.support.backends import CPU, Backend
from tests.support.checks import assert_matches_oracle, assert_same_bytes
from tests.support.scoring import (
    assert_padding_is_ignored,
    attention_arguments,
    every_extreme,
    every_huge,
    every_padded_shape,
    extreme_inputs,
    huge_inputs,
    shapes_and_dtypes,
)
from tests.support.shapes import Shape

OP = "attention_lse"


@pytest.mark.every_isa
@shapes_and_dtypes
def test_matches_oracle(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    arguments = attention_arguments(shape, backend.device, dtype)
    assert_matches_oracle(backend, OP, arguments)
    assert_matches_oracle(backend, OP, {**arguments, "causal": False, "sm_scale": -0.7})


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_few_rows(backend: Backend, num_rows: int) -> None:
    """The rows of one or a few tokens; on CUDA up to 16 per KV head go another way."""
    dtype = (torch.bfloat16, torch.float16)[num_rows % 2]
    arguments = attention_arguments(shapes.DECODE, backend.device, dtype)
    arguments["query"] = arguments["query"][:, :, -num_rows:]
    assert_matches_oracle(backend, OP, arguments)
    assert_matches_oracle(backend, OP, {**arguments, "causal": False, "sm_scale": -0.7})


def test_not_causal_takes_more_rows_than_keys(backend: Backend) -> None:
    shape = Shape("free", qo_len=19, kv_len=5, left_padding=(2, 5))
    lse = assert_matches_oracle(
        backend, OP, {**attention_arguments(shape, backend.device), "causal": False}
    )
    assert lse[0].isfinite().all() and lse[1].isneginf().all()
    no_keys = attention_arguments(replace(shape, kv_len=0, left_padding=()), backend.device)
    lse = assert_matches_oracle(backend, OP, {**no_keys, "causal": False})
    assert lse.isneginf().all() and lse.shape == (2, 4, 19)


def test_padding_rows_are_minus_infinity(backend: Backend) -> None:
    arguments = attention_arguments(shapes.LEFT_PADDED, backend.device)
    lse = backend.op(OP)(**arguments)
    padding = ~arguments["key_mask"][:, None].expand_as(lse)
    assert torch.equal(lse.isneginf(), padding)


@every_padded_shape
def test_padding_may_hold_anything(backend: Backend, shape: Shape) -> None:
    assert_padding_is_ignored(backend, OP, attention_arguments(shape, backend.device))


@pytest.mark.every_isa
@every_extreme
def test_extreme(backend: Backend, extreme: str) -> None:
    arguments = extreme_inputs(backend.device)[extreme]
    assert_matches_oracle(backend, OP, arguments, extreme=True)


@pytest.mark.every_isa
@every_huge
def test_huge_logits(huge: str) -> None:
    """A row has a finite log-sum-exp wherever its logits are."""
    arguments = huge_inputs("cpu")[huge]
    assert_matches_oracle(CPU, OP, arguments, extreme=True)


def test_nan_is_not_hidden(backend: Backend) -> None:
    """A row that sees a NaN has no log-sum-exp; the rows before it are as they were."""
    arguments = attention_arguments(Shape("square", qo_len=21), backend.device)
    expected = backend.op(OP)(**arguments)
    arguments["key"][:, :, 11, 3] = torch.nan
    lse = backend.op(OP)(**arguments)
    assert_same_bytes(lse[:, :, :11], expected[:, :, :11])
    assert lse[:, :, 11:].isnan().all()
