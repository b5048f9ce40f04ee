"""Reads of the host are found."""

from __future__ import annotations

import torch

from tests.support.reads import Reads


def test_a_read_is_found() -> None:
    ones = torch.ones(3)
    with Reads() as reads:
        float(ones[0])
        ones[ones > 0]
        ones.nonzero()
    assert reads.found == ["aten::_local_scalar_dense", "aten::index", "aten::nonzero"]
