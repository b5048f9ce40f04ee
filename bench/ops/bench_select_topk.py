"""Selection with ascending indices, one list per KV head of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_equal
from bench.harness import Case, Work
from bench.report import OURS, times_faster
from bench.shapes import A8, A32, B32K, B128K, C, Workload, attention_like_scores
from kvevict import reference


def make_case(shape: Workload, percent: int) -> Case:
    """Scores of one layer, `percent` of the keys kept."""
    k = shape.kept(percent)
    rows = shape.batch_size * shape.num_kv_heads

    def check(scores: Tensor, results: Mapping[str, Any]) -> None:
        expected = reference.select_topk(scores, k)
        check_equal(OURS, results[OURS], expected)
        # Ties may go either way here: the kept scores must be the same, not the indices.
        kept = [scores.gather(2, index.long()) for index in (results["topk + sort"], expected[0])]
        check_equal("topk + sort", [kept[0].sort().values], [kept[1].sort().values])

    return Case(
        op="select_topk",
        name=f"{shape.name} {percent}%",
        make_inputs=lambda: attention_like_scores(
            shape.batch_size, shape.num_kv_heads, shape.kv_len
        ),
        contenders={
            OURS: lambda scores: kvevict.select_topk(scores, k),
            "topk + sort": lambda scores: peers.topk_sorted(scores, k),
        },
        check=check,
        stages=(Work(num_bytes=4 * rows * (shape.kv_len + k)),),
        goals=(times_faster("topk + sort", 3),) if shape in (A8, A32, B32K) else (),
    )


CASES = [
    make_case(shape, percent) for shape in (A8, A32, B32K, B128K, C) for percent in (5, 20, 50)
]


def test_select_topk(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
