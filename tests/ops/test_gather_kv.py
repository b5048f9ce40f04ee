"""gather_kv: every byte is exact."""

from __future__ import annotations

import pytest
import torch

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, to_cpu
from tests.support.moving import CASES, every_case, moving_arguments

OP = "gather_kv"


@pytest.mark.every_isa
@every_case
def test_matches_oracle(backend: Backend, case: str) -> None:
    arguments = CASES[case](backend.device)
    expected = reference.gather_kv(**to_cpu(arguments))
    assert_same_bytes(backend.op(OP)(**arguments), expected)


def test_beyond_kept_lens_anything_may_stand(backend: Backend) -> None:
    arguments = moving_arguments(backend.device, (2, 3))
    expected = backend.op(OP)(**arguments)
    index = torch.arange(20, device=backend.device)
    beyond = index >= arguments["kept_lens"][..., None]
    arguments["kept_indices"].masked_fill_(beyond, 2**30)
    assert_same_bytes(backend.op(OP)(**arguments), expected)
