"""The template op: the shortest complete test of an op."""

from __future__ import annotations

import pytest
import torch

from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes


@pytest.mark.parametrize("size", [(), (0,), (1,), (3, 5), (2, 0, 4), (40_000,)], ids=str)
def test_copies(backend: Backend, size: tuple[int, ...]) -> None:
    source = torch.randn(size, device=backend.device)
    result = backend.op("null")(source)
    assert_same_bytes(result, source)
    assert size == (0,) or result.numel() == 0 or result.data_ptr() != source.data_ptr()


@pytest.mark.every_isa
def test_copies_every_bit(backend: Backend) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_003,), dtype=torch.int32, device=backend.device)
    assert_same_bytes(backend.op("null")(bits.view(torch.float32)), bits.view(torch.float32))


def test_any_strides(backend: Backend) -> None:
    source = torch.randn(4, 6, device=backend.device)
    assert_same_bytes(backend.op("null")(source.t()), source.t())
    assert_same_bytes(backend.op("null")(source[:, ::2]), source[:, ::2])
