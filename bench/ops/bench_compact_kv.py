"""Kept rows of keys and values moved to the front in place, several layers at a time.

Ours gets a freshly filled cache each time, none of it in the processor's caches; the peers copy the
kept rows into new tensors. The index forms that the peers need are made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import kvevict
from bench import peers
from bench.checks import check_equal
from bench.harness import Case, Work
from bench.report import OURS, rate_or_fraction, times_faster
from bench.shapes import A8, A32, B32K, CacheInputs, Workload, cache_inputs
from kvevict import reference

GOALS = (rate_or_fraction(28, 0.56), times_faster("gather", 8), times_faster("index_select", 1))


def make_case(shape: Workload, percent: int) -> Case:
    """bf16, every layer and head its own list."""
    k = shape.kept(percent)

    def check(x: CacheInputs, results: Mapping[str, Any]) -> None:
        expected_keys, expected_values = reference.gather_kv(x.keys, x.values, x.kept_indices)
        expected = [*expected_keys, *expected_values]
        for name, result in results.items():
            if name == OURS:
                compacted = result[1]
                result = [layer[:, :, :k] for layer in (*compacted.keys, *compacted.values)]
            check_equal(name, result, expected)

    return Case(
        op="compact_kv_",
        name=shape.describe_moves(percent),
        make_inputs=lambda: cache_inputs(shape, percent, torch.bfloat16),
        contenders={
            OURS: lambda x: kvevict.compact_kv_(x.keys, x.values, x.kept_indices),
        }
        | peers.MOVES,
        check=check,
        stages=(Work(num_bytes=shape.moved_bytes(percent, torch.bfloat16), memory="nt_copy"),),
        goals=GOALS,
        restore=restore,
    )


def restore(overwritten: CacheInputs, pristine: CacheInputs) -> None:
    """Fills the cache again."""
    for name in ("keys", "values"):
        torch._foreach_copy_(getattr(overwritten, name), getattr(pristine, name))


CASES = [make_case(shape, percent) for shape in (A8, A32, B32K) for percent in (5, 20, 50)]


def test_compact_kv(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
