"""Inputs that the tests of the scoring ops share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import shapes
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes
from tests.support.samples import Arguments
from tests.support.shapes import Shape

LOW_PRECISION = (torch.float16, torch.bfloat16)
SHAPES_AND_DTYPES = [
    *((shape, torch.float32) for shape in shapes.ALL),
    *(
        (shape, dtype)
        for shape in (shapes.SMALLEST, shapes.ODD, shapes.GROUP_7, shapes.SLICED, shapes.LONG)
        for dtype in LOW_PRECISION
    ),
]
every_padded_shape = pytest.mark.parametrize("shape", shapes.PADDED, ids=str)
shapes_and_dtypes = pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)


def attention_arguments(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Arguments:
    """Return query, key and key_mask of a shape."""
    inputs = shapes.make_attention(shape, dtype, device)
    return {"query": inputs.query, "key": inputs.key, "key_mask": inputs.key_mask}


def spoil_padding(arguments: Arguments) -> Arguments:
    """Return the arguments with NaN and infinity where the key mask says padding."""
    query, key, mask = arguments["query"], arguments["key"], arguments["key_mask"]
    query_mask = mask[:, mask.shape[1] - query.shape[2] :]
    query = query.masked_fill(~query_mask[:, None, :, None], torch.inf)
    query[..., ::2].masked_fill_(~query_mask[:, None, :, None], torch.nan)
    key = key.masked_fill(~mask[:, None, :, None], torch.nan)
    return {**arguments, "query": query, "key": key}


def assert_padding_is_ignored(backend: Backend, op: str, arguments: Arguments) -> Any:
    """Assert that padding may hold anything, bit for bit; return what the op returns."""
    expected = backend.op(op)(**arguments)
    assert_same_bytes(backend.op(op)(**spoil_padding(arguments)), expected)
    return expected


def extreme_inputs(device: str) -> dict[str, Arguments]:
    """Return inputs whose softmax is hard: by name, query and key in float32."""
    shape = Shape("extreme", 1, 4, 2, 40, 150, 64)
    base = attention_arguments(shape, device)
    query, key = base["query"], base["key"]
    # One direction of all queries and keys decides: the logits are an ascending or falling ramp.
    ramp = torch.linspace(-20, 20, shape.kv_len, device=device)
    along = torch.zeros_like(key)
    along[..., 0] = ramp
    unit = torch.zeros_like(query)
    unit[..., 0] = 60.0
    return {
        "large": {"query": query * 30, "key": key * 30},
        "larger": {"query": query * 3e3, "key": key * 3e3},
        "ascending": {"query": unit, "key": along},
        "descending": {"query": unit, "key": along.flip(2)},
        "tiny": {"query": query * 1e-25, "key": key * 1e-25},
        "all_equal": {"query": torch.ones_like(query), "key": torch.ones_like(key)},
        "far_below_zero": {"query": unit, "key": along - 100 * (unit.amax() / 60)},
    }


def huge_inputs(device: str) -> dict[str, Arguments]:
    """Return inputs whose logits are so large that different ones are hundreds apart in float32."""
    base = attention_arguments(Shape("huge", 1, 4, 2, 40, 150, 64), device)
    query, key = base["query"], base["key"]
    return {
        "large": {"query": query * 1e6, "key": key * 1e6},
        "positive": {"query": query.abs() * 1e17, "key": key.abs() * 1e17},
        "negative": {"query": query.abs() * 1e17, "key": key.abs() * -1e17},
    }


every_huge = pytest.mark.parametrize("huge", tuple(huge_inputs("cpu")))
EXTREMES = tuple(extreme_inputs("cpu"))
every_extreme = pytest.mark.parametrize("extreme", EXTREMES)
