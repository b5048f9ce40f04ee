"""Kept rows of keys and values copied into new tensors, several layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import kvevict
from bench import peers
from bench.checks import check_equal
from bench.harness import Case, Work
from bench.report import OURS
from bench.shapes import A8, A32, B32K, CacheInputs, Workload, cache_inputs
from kvevict import reference


def make_case(shape: Workload, percent: int) -> Case:
    """bf16, every layer and head its own list."""

    def check(x: CacheInputs, results: Mapping[str, Any]) -> None:
        keys, values = reference.gather_kv(x.keys, x.values, x.kept_indices)
        for name, result in results.items():
            moved = [*result[0], *result[1]] if name == OURS else result
            check_equal(name, moved, [*keys, *values])

    return Case(
        op="gather_kv",
        name=shape.describe_moves(percent),
        make_inputs=lambda: cache_inputs(shape, percent, torch.bfloat16),
        contenders={
            OURS: lambda x: kvevict.gather_kv(x.keys, x.values, x.kept_indices),
        }
        | peers.MOVES,
        check=check,
        stages=(Work(num_bytes=shape.moved_bytes(percent, torch.bfloat16), memory="nt_copy"),),
    )


CASES = [make_case(A8, 20), make_case(A32, 20), make_case(B32K, 20)]


def test_gather_kv(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
