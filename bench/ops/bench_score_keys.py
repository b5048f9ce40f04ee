"""Attention received by each key, with and without a known log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS, fraction_of_peak, times_faster
from bench.shapes import A8, A32, B32K, DTYPE_NAMES, C, Workload, attention_inputs
from kvevict import reference

GOALS = (fraction_of_peak(0.65), times_faster("eager", 5), times_faster("compile", 2))


def make_case(shape: Workload, dtype: torch.dtype, *, given_lse: bool = False) -> Case:
    """One layer; peers are kvpress-style eager scoring, the same compiled, and our best torch."""

    def make_inputs() -> dict[str, Tensor | None]:
        inputs = attention_inputs(shape, dtype)
        lse = peers.attention_lse(inputs.query.float(), inputs.key.float()) if given_lse else None
        return {"query": inputs.query, "key": inputs.key, "softmax_lse": lse}

    def eager(x: Mapping[str, Tensor]) -> Tensor:
        if given_lse:
            return peers.scores_given_lse(**x)
        return peers.snapkv_scores(x["query"], x["key"])

    def compiled(x: Mapping[str, Tensor]) -> Tensor:
        if given_lse:
            return peers.compiled(peers.scores_given_lse)(**x)
        return peers.compiled(peers.snapkv_scores)(x["query"], x["key"])

    def best(x: Mapping[str, Tensor]) -> Tensor:
        return peers.compiled(peers.grouped_scores)(x["query"], x["key"])

    def check(x: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> None:
        group = shape.group_size  # the last sequence and KV head stand for all
        expected = reference.score_keys(x["query"][-1:, -group:], x["key"][-1:, -1:])
        for name, result in results.items():
            check_close(name, result[-1:, -1:], expected, dtype)

    return Case(
        op="score_keys",
        name=f"{shape.name} {DTYPE_NAMES[dtype]}{' LSE given' if given_lse else ''}",
        make_inputs=make_inputs,
        contenders={
            OURS: lambda x: kvevict.score_keys(**x),
            "eager": eager,
            "compile": compiled,
        }
        | ({} if given_lse else {"best torch": best}),
        check=check,
        stages=(Work(shape.matmul_flops, shape.key_bytes(dtype), dtype),),
        goals=GOALS if shape in (A8, A32) and not given_lse else (),
    )


CASES = [
    make_case(A8, torch.float32),
    make_case(A8, torch.bfloat16),
    make_case(A32, torch.float32),
    make_case(A32, torch.bfloat16),
    make_case(A32, torch.bfloat16, given_lse=True),
    make_case(B32K, torch.bfloat16),
    make_case(C, torch.bfloat16),
]


def test_score_keys(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
