"""Text-weighted scoring of TGV-KV; the text rows are the last of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS, times_faster
from bench.shapes import A8, A32, B32K, DTYPE_NAMES, Workload, attention_inputs
from kvevict import reference

# The oracle's float64 attention of all heads takes many times this; beyond, eager fp32 checks.
MOST_LOGITS_FOR_THE_ORACLE = 20_000_000


def make_case(shape: Workload, dtype: torch.dtype) -> Case:
    """One layer; ours, the eager formula and the same compiled."""

    def make_inputs() -> dict[str, Tensor]:
        inputs = attention_inputs(shape, dtype)
        rows = torch.arange(shape.num_rows, dtype=torch.int32).expand(shape.batch_size, -1)
        return {"query": inputs.query, "key": inputs.key, "row_index": rows.contiguous()}

    def check(x: Mapping[str, Tensor], results: Mapping[str, tuple[Tensor, ...]]) -> None:
        if shape.logits < MOST_LOGITS_FOR_THE_ORACLE:
            expected = reference.score_keys_by_text(**x)
        else:
            expected = peers.tgv_scores(x["query"].float(), x["key"].float())
        for name, result in results.items():
            for part, wanted in zip(result, expected, strict=True):
                check_close(name, part, wanted, dtype)

    return Case(
        op="score_keys_by_text",
        name=f"{shape.name} {DTYPE_NAMES[dtype]}",
        make_inputs=make_inputs,
        contenders={
            OURS: lambda x: kvevict.score_keys_by_text(**x),
            "eager": lambda x: peers.tgv_scores(x["query"], x["key"]),
            "compile": lambda x: peers.compiled(peers.tgv_scores)(x["query"], x["key"]),
        },
        check=check,
        stages=(Work(shape.matmul_flops, shape.key_bytes(dtype), dtype),),
        goals=(times_faster("eager", 5),) if shape in (A8, A32) else (),
    )


CASES = [
    make_case(A8, torch.float32),
    make_case(A8, torch.bfloat16),
    make_case(A32, torch.float32),
    make_case(A32, torch.bfloat16),
    make_case(B32K, torch.bfloat16),
]


def test_score_keys_by_text(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
