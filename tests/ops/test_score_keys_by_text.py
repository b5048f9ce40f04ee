"""score_keys_by_text against its oracle."""

from __future__ import annotations

import pytest
import torch

from kvevict import reference
from kvevict.ops.enums import HeadReduction
from tests.support import shapes
from tests.support.backends import CPU, Backend
from tests.support.checks import assert_matches_oracle
from tests.support.samples import Arguments
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
from tests.support.shapes import Shape, make_rows
from tests.support.tolerances import assert_scores_close

OP = "score_keys_by_text"


def text_arguments(
    shape: Shape, device: str, dtype: torch.dtype = torch.float32, *, num_rows: int = 11
) -> Arguments:
    return {
        **attention_arguments(shape, device, dtype),
        "row_index": make_rows(shape.batch_size, num_rows, shape.qo_len, device),
    }


@pytest.mark.every_isa
@shapes_and_dtypes
def test_matches_oracle(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    arguments = text_arguments(shape, backend.device, dtype)
    assert_matches_oracle(backend, OP, {**arguments, "sm_scale": -0.3})
    last_rows = torch.arange(shape.qo_len, dtype=torch.int32, device=backend.device)[-50:]
    arguments["row_index"] = last_rows.expand(shape.batch_size, -1)
    assert_matches_oracle(backend, OP, arguments)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 129, 301])
def test_number_of_rows(backend: Backend, num_rows: int) -> None:
    assert_matches_oracle(
        backend, OP, text_arguments(shapes.LEFT_PADDED, backend.device, num_rows=num_rows)
    )


def test_given_lse(backend: Backend) -> None:
    arguments = text_arguments(shapes.GROUP_4, backend.device, num_rows=70)
    softmax_lse = reference.attention_lse(arguments["query"].cpu(), arguments["key"].cpu())
    softmax_lse = softmax_lse + torch.rand(softmax_lse.shape)
    arguments["softmax_lse"] = softmax_lse.float().to(backend.device)
    assert_matches_oracle(backend, OP, arguments)


def test_nobody_votes(backend: Backend) -> None:
    arguments = text_arguments(shapes.ODD, backend.device)
    arguments["row_index"].fill_(-1)
    for result in assert_matches_oracle(backend, OP, arguments):
        assert (result == 0).all()


def test_column_sums_are_the_unweighted_scores(backend: Backend) -> None:
    arguments = text_arguments(shapes.LONG, backend.device, num_rows=40)
    _, column_sums, row_weights = backend.op(OP)(**arguments)
    on_cpu = {name: None if t is None else t.cpu() for name, t in arguments.items()}
    expected = reference.score_keys(**on_cpu, head_reduction=HeadReduction.ALL_MEAN)
    assert_scores_close(column_sums, expected)
    weighted = reference.score_keys(
        **on_cpu, row_weight=row_weights.cpu(), head_reduction=HeadReduction.ALL_MEAN
    )
    assert_scores_close(backend.op(OP)(**arguments)[0], weighted)


@every_padded_shape
def test_padding_may_hold_anything(backend: Backend, shape: Shape) -> None:
    assert_padding_is_ignored(backend, OP, text_arguments(shape, backend.device))


@pytest.mark.every_isa
@every_extreme
def test_extreme(backend: Backend, extreme: str) -> None:
    arguments = extreme_inputs(backend.device)[extreme]
    arguments["row_index"] = make_rows(1, 20, 40, backend.device)
    assert_matches_oracle(backend, OP, arguments, extreme=True)


@pytest.mark.every_isa
@every_huge
def test_huge_logits(huge: str) -> None:
    """The largest logit of a row takes all; no row is lost."""
    arguments = huge_inputs("cpu")[huge] | {"row_index": make_rows(1, 20, 40)}
    assert_matches_oracle(CPU, OP, arguments, extreme=True)
