"""score_keys against its oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvevict import reference
from kvevict.ops.enums import HeadReduction, Statistic
from tests.support import shapes
from tests.support.backends import CPU, Backend
from tests.support.checks import assert_matches_oracle, assert_same_bytes
from tests.support.samples import Arguments
from tests.support.scoring import (
    assert_padding_is_ignored,
    attention_arguments,
    every_extreme,
    every_huge,
    extreme_inputs,
    huge_inputs,
    shapes_and_dtypes,
)
from tests.support.shapes import Shape, make_rows

OP = "score_keys"
MODES = list(itertools.product(Statistic, HeadReduction))
every_mode = pytest.mark.parametrize(("statistic", "head_reduction"), MODES)


def voting_arguments(shape: Shape, device: str, *, num_rows: int = 11) -> Arguments:
    """Return rows with duplicates and -1, and a weight for every head and row, some of them 0."""
    row_weight = torch.rand(shape.batch_size, shape.num_qo_heads, num_rows, device=device)
    return {
        "row_index": make_rows(shape.batch_size, num_rows, shape.qo_len, device),
        "row_weight": row_weight * (row_weight > 0.2),
    }


@pytest.mark.every_isa
@shapes_and_dtypes
def test_matches_oracle(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    arguments = attention_arguments(shape, backend.device, dtype)
    assert_matches_oracle(backend, OP, arguments)
    voting = voting_arguments(shape, backend.device)
    assert_matches_oracle(backend, OP, {**arguments, **voting, "sm_scale": -0.3})


@pytest.mark.every_isa
@every_mode
@pytest.mark.parametrize("shape", [shapes.LEFT_PADDED, shapes.GROUP_7], ids=str)
def test_modes(backend: Backend, shape: Shape, statistic: int, head_reduction: int) -> None:
    arguments = attention_arguments(shape, backend.device)
    arguments |= {"statistic": statistic, "head_reduction": head_reduction}
    assert_matches_oracle(backend, OP, arguments)
    voting = voting_arguments(shape, backend.device)
    assert_matches_oracle(backend, OP, {**arguments, **voting, "causal": False})
    shared = {**voting, "row_weight": voting["row_weight"][:, 0]}
    assert_matches_oracle(backend, OP, {**arguments, **shared})


@every_mode
def test_given_lse(backend: Backend, statistic: int, head_reduction: int) -> None:
    """It is used as given, also where it is wrong; a row at -inf has no vote."""
    shape = shapes.GROUP_4
    arguments = attention_arguments(shape, backend.device)
    softmax_lse = reference.attention_lse(arguments["query"].cpu(), arguments["key"].cpu())
    softmax_lse = softmax_lse + torch.rand(softmax_lse.shape)
    softmax_lse[:, 1::3, ::5] = -torch.inf
    arguments |= {
        "softmax_lse": softmax_lse.float().to(backend.device),
        "statistic": statistic,
        "head_reduction": head_reduction,
    }
    assert_matches_oracle(backend, OP, arguments)
    voting = voting_arguments(shape, backend.device)
    assert_matches_oracle(backend, OP, {**arguments, **voting})


@every_mode
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_few_rows(backend: Backend, statistic: int, head_reduction: int, num_rows: int) -> None:
    """The rows of one or a few tokens; on CUDA up to 16 per KV head go another way."""
    dtype = (torch.bfloat16, torch.float16)[num_rows % 2]
    arguments = attention_arguments(shapes.DECODE, backend.device, dtype)
    arguments |= {"statistic": statistic, "head_reduction": head_reduction}
    last = {**arguments, "query": arguments["query"][:, :, -num_rows:]}
    assert_matches_oracle(backend, OP, last)
    voting = voting_arguments(shapes.DECODE, backend.device, num_rows=num_rows)
    assert_matches_oracle(backend, OP, {**arguments, **voting, "causal": False})


@every_mode
@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_voting_row(
    backend: Backend, statistic: int, head_reduction: int, num_rows: int
) -> None:
    arguments = attention_arguments(shapes.ODD, backend.device)
    nobody = torch.full((3, num_rows), -1, dtype=torch.int32, device=backend.device)
    scores = assert_matches_oracle(
        backend,
        OP,
        {
            **arguments,
            "row_index": nobody,
            "statistic": statistic,
            "head_reduction": head_reduction,
        },
    )
    assert (scores == 0).all()


def test_more_rows_than_keys(backend: Backend) -> None:
    """Free sets of rows and keys, and a list of rows longer than the query."""
    shape = Shape("free", qo_len=150, kv_len=5, left_padding=(2, 5))
    arguments = attention_arguments(shape, backend.device) | {"causal": False}
    assert_matches_oracle(backend, OP, arguments)
    voting = voting_arguments(shape, backend.device, num_rows=301)
    scores = assert_matches_oracle(backend, OP, {**arguments, **voting})
    assert (scores[1] == 0).all()


@every_mode
def test_padding_may_hold_anything(backend: Backend, statistic: int, head_reduction: int) -> None:
    arguments = attention_arguments(shapes.LEFT_PADDED, backend.device)
    arguments |= {"statistic": statistic, "head_reduction": head_reduction}
    scores = assert_padding_is_ignored(backend, OP, arguments)
    assert (scores.movedim(1, -1)[~arguments["key_mask"]] == 0).all()


@pytest.mark.every_isa
@every_extreme
@pytest.mark.parametrize("statistic", list(Statistic))
def test_extreme(backend: Backend, extreme: str, statistic: int) -> None:
    arguments = extreme_inputs(backend.device)[extreme] | {"statistic": statistic}
    assert_matches_oracle(backend, OP, arguments, extreme=True)


@pytest.mark.every_isa
@every_huge
def test_huge_logits(huge: str) -> None:
    """The largest logit of a row takes all; no row is lost."""
    arguments = huge_inputs("cpu")[huge]
    assert_matches_oracle(CPU, OP, arguments, extreme=True)


@pytest.mark.every_isa
@pytest.mark.parametrize("sm_scale", [0.0, -0.0, -0.3])
def test_scale_is_any_finite_number(backend: Backend, sm_scale: float) -> None:
    query = torch.randn(1, 2, 3, 16, device=backend.device)
    key = torch.randn(1, 1, 7, 16, device=backend.device)
    key_mask = torch.ones(1, 7, dtype=torch.bool, device=backend.device)
    key_mask[0, 0] = False
    arguments = {"query": query, "key": key, "key_mask": key_mask, "sm_scale": sm_scale}
    scores = backend.op("score_keys")(**arguments)
    torch.testing.assert_close(
        scores.double(), reference.score_keys(**arguments), rtol=1e-5, atol=0
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_the_keys_that_its_row_sees(backend: Backend, dtype: torch.dtype) -> None:
    query = torch.randn(1, 1, 2, 16, device=backend.device).to(dtype)
    key = (torch.randn(1, 1, 40, 16, device=backend.device) * 60).to(dtype)
    key[0, 0, 3, 5] = torch.nan
    key_mask = torch.ones(1, 40, dtype=torch.bool, device=backend.device)
    key_mask[0, 7] = False
    scores = backend.op("score_keys")(query[:, :, :1], key, key_mask=key_mask, causal=False)
    assert torch.equal(scores.isnan()[0, 0], key_mask[0])
    assert scores[0, 0, 7] == 0


@pytest.mark.parametrize("qo_len", [21, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_not_hidden(backend: Backend, dtype: torch.dtype, qo_len: int) -> None:
    """One row with a NaN spoils the scores of all keys that it sees, and no other head's."""
    shape = Shape("tall", qo_len=qo_len, num_kv_heads=4)
    arguments = attention_arguments(shape, backend.device, dtype)
    arguments["query"][:, 2, -10, 3] = torch.nan
    scores = backend.op(OP)(**arguments)
    assert scores[:, 2, :12].isnan().all()
    assert scores[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("num_rows", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_start_anywhere(backend: Backend, dtype: torch.dtype, num_rows: int) -> None:
    """A slice of the last dimension is not aligned to 16 bytes."""
    shape = Shape("whole", kv_len=150, qo_len=num_rows, head_dim=80)
    arguments = attention_arguments(shape, backend.device, dtype)
    shifted = {name: arguments[name][..., 3:75] for name in ("query", "key")}
    assert_matches_oracle(backend, OP, shifted)


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Sequences more than 2**31 elements apart; only the pages in use are ever touched."""
    arguments = attention_arguments(Shape("far", left_padding=(0, 2)), backend.device)
    arguments |= {name: arguments[name].half() for name in ("query", "key")}
    expected = backend.op(OP)(**arguments)
    key = arguments["key"]
    whole = torch.empty(2**31 + key.numel(), dtype=key.dtype, device=key.device)
    far = whole.as_strided(key.shape, (2**31, *key.stride()[1:]))
    far.copy_(key)
    assert_same_bytes(backend.op(OP)(**{**arguments, "key": far}), expected)
