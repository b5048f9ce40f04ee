"""Cost of a call: argument checks, dispatch and the allocation of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.checks import check_equal
from bench.harness import Case
from bench.report import OURS
from kvevict import ops

CALLS = 1000


def repeat(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Calls `function` many times: one call is shorter than the clock is exact."""

    def run(x: Tensor) -> Tensor:
        for _ in range(CALLS):
            result = function(x)
        return result

    return run


def check(x: Tensor, results: Mapping[str, Tensor]) -> None:
    """Every contender copies."""
    for name, result in results.items():
        check_equal(name, [result], [x])


CASES = [
    Case(
        op="null",
        name=f"{CALLS} calls",
        make_inputs=lambda: torch.randn(1),
        contenders={OURS: repeat(ops.null), "clone": repeat(torch.clone)},
        check=check,
        cold=False,
    )
]


def test_null(run: Callable[[Case], None], case: Case) -> None:
    """Prints the overhead of a thousand calls."""
    run(case)
