"""Attention, value norms and key diversity in one score, one row per KV head of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS
from bench.shapes import A8, A32, B32K, Workload, attention_like_scores
from kvevict import reference


def make_case(shape: Workload) -> Case:
    """All keys are candidates."""
    size = (shape.batch_size, shape.num_kv_heads, shape.kv_len)

    def make_inputs() -> dict[str, Tensor]:
        return {
            "scores": attention_like_scores(*size),
            "similarity": torch.rand(size),
            "value_norm": 5 + 10 * torch.rand(size),
            "redundancy": torch.rand(size[:2]),
        }

    def check(x: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> None:
        expected = reference.mix_scores(**{name: t[-1:, -1:] for name, t in x.items()})
        for name, result in results.items():
            check_close(name, result[-1:, -1:], expected, torch.float32)

    return Case(
        op="mix_scores",
        name=shape.name,
        make_inputs=make_inputs,
        contenders={
            OURS: lambda x: kvevict.mix_scores(**x),
            "eager": lambda x: peers.mix_scores(**x),
            "compile": lambda x: peers.compiled(peers.mix_scores)(**x),
        },
        check=check,
        stages=(Work(num_bytes=16 * shape.batch_size * shape.num_kv_heads * shape.kv_len),),
    )


CASES = [make_case(A8), make_case(A32), make_case(B32K)]


def test_mix_scores(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
