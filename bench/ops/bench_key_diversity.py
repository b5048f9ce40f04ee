"""Mean cosine of every key to all keys of its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS, fraction_of_peak, times_faster
from bench.shapes import A8, A32, B32K, DTYPE_NAMES, Workload, attention_inputs
from kvevict import reference

GOALS = (fraction_of_peak(0.8), times_faster("compile", 10))


def make_case(shape: Workload, dtype: torch.dtype) -> Case:
    """One layer. Keys have a common part, as those of models have: a mean cosine of 0.5."""

    def check(key: Tensor, results: Mapping[str, Any]) -> None:
        expected = reference.key_diversity(key[-1:, -1:])  # the last head stands for all
        for name, result in results.items():
            for actual, wanted in zip(result, expected, strict=True):
                check_close(name, actual[-1:, -1:], wanted, dtype)

    num_keys = shape.batch_size * shape.num_kv_heads * shape.kv_len
    return Case(
        op="key_diversity",
        name=f"{shape.name} {DTYPE_NAMES[dtype]}",
        make_inputs=lambda: attention_inputs(shape, dtype).key.add_(1),
        contenders={
            OURS: lambda key: kvevict.key_diversity(key),
            "eager": lambda key: peers.key_diversity(key),
            "compile": lambda key: peers.compiled(peers.key_diversity)(key),
        },
        check=check,
        stages=(Work(num_bytes=shape.key_bytes(dtype) + 4 * num_keys),),
        goals=GOALS,
    )


CASES = [
    make_case(A8, torch.bfloat16),
    make_case(A32, torch.float32),
    make_case(A32, torch.bfloat16),
    make_case(B32K, torch.bfloat16),
]


def test_key_diversity(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
