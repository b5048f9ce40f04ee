"""Every bad call of tests/support/refusals.py is refused, in words, before anything is written."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tests.support.backends import EMULATED, OPS, Backend
from tests.support.checks import assert_same_bytes, clone
from tests.support.refusals import REFUSALS, Refusal, make_good, overlapping_arguments
from tests.support.samples import Arguments

# What the op writes, by the argument that the message about shared memory names.
WRITING = {"compact_kv_": "values", "merge_tokens_": "tensors", "score_and_compact": "value"}


def on_device(tree: Arguments) -> Arguments:
    """Return a copy of the tensors that have bytes."""
    return clone(pytree.tree_map_only(Tensor, lambda t: None if t.is_meta else t, tree))


def refused(backend: Backend, op: str, arguments: Arguments, blamed: str) -> str:
    """Assert that the call is refused because of `blamed`; return the message."""
    before = on_device(arguments)
    with pytest.raises(ValueError) as error:
        backend.op(op)(**arguments)
    message = str(error.value)
    assert re.fullmatch(rf"kvevict::{op}: {blamed}(\[\d+\])? must .+, got .+", message), message
    assert_same_bytes(on_device(arguments), before, "written before the refusal")
    return message


@pytest.mark.parametrize("op", OPS)
def test_the_good_call_is_good(backend: Backend, op: str) -> None:
    backend.op(op)(**make_good(op, backend.device))


def test_every_argument_has_refusals() -> None:
    in_table = {(row.op, row.argument) for row in REFUSALS}
    for op in OPS:
        for argument, value in make_good(op, "cpu").items():
            assert isinstance(value, bool) or (op, argument) in in_table, f"{op} {argument}"


@pytest.mark.parametrize("row", REFUSALS, ids=str)
def test_refusal(backend: Backend, row: Refusal) -> None:
    if row.reads_data and backend.device != "cpu":
        pytest.skip("data is not read on this device")
    if row.case == "device" and backend == EMULATED:
        pytest.skip("a meta tensor asks for a fake kernel, and it has none")
    arguments = row.make_arguments(backend.device)
    message = refused(backend, row.op, arguments, row.blamed)
    if row.reads_data or backend == EMULATED:  # has no fake kernels
        return
    with FakeTensorMode() as mode:
        fake_arguments = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        with pytest.raises(ValueError) as error:
            backend.op(row.op)(**fake_arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("op", WRITING)
def test_key_and_value_that_overlap(backend: Backend, op: str, case: int) -> None:
    _, arguments = list(overlapping_arguments(op, backend.device))[case]
    refused(backend, op, arguments, WRITING[op])


def test_interleaved_key_and_value_do_not_overlap(backend: Backend) -> None:
    """Slices of one buffer, as a fused projection gives them, are fine."""
    fused = torch.randn(2, 6, 4, 16, device=backend.device)
    key, value = (half.transpose(1, 2) for half in fused.split(2, dim=2))
    kept_indices = torch.tensor([[[1, 3, 5]]], dtype=torch.int32, device=backend.device)
    expected = fused[:, [1, 3, 5]].clone()
    backend.op("compact_kv_")([key], [value], kept_indices.expand(2, 1, 3))
    assert_same_bytes(fused[:, :3], expected)
