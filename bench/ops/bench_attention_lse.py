"""Log-sum-exp of the voting rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS
from bench.shapes import (
    A8,
    A32,
    B32K,
    DTYPE_NAMES,
    AttentionInputs,
    Workload,
    attention_inputs,
)
from kvevict import reference


def make_case(shape: Workload, dtype: torch.dtype) -> Case:
    """One layer, the rows of the window, all keys."""

    def check(inputs: AttentionInputs, results: Mapping[str, Tensor]) -> None:
        group = shape.group_size  # the last KV head stands for all
        expected = reference.attention_lse(inputs.query[:, -group:], inputs.key[:, -1:])
        for name, result in results.items():
            check_close(name, result[:, -group:], expected, dtype)

    return Case(
        op="attention_lse",
        name=f"{shape.name} {DTYPE_NAMES[dtype]}",
        make_inputs=lambda: attention_inputs(shape, dtype),
        contenders={
            OURS: lambda x: kvevict.attention_lse(x.query, x.key),
            "eager": lambda x: peers.attention_lse(x.query, x.key),
        },
        check=check,
        stages=(Work(shape.matmul_flops, shape.key_bytes(dtype), dtype),),
    )


CASES = [
    make_case(A8, torch.bfloat16),
    make_case(A32, torch.float32),
    make_case(A32, torch.bfloat16),
    make_case(B32K, torch.bfloat16),
]


def test_attention_lse(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
