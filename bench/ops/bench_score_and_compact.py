"""A whole SnapKV step of one layer: score, pool, select and move keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close, check_same_choice
from bench.harness import Case, Work
from bench.report import OURS, times_faster
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

POOL_KERNEL = 5
# Eager torch rounds scores to the dtype of the inputs: its choice differs near the threshold.
SHARE_IN_COMMON = {torch.float32: 0.999, torch.bfloat16: 0.9}


def make_case(shape: Workload, percent: int, dtype: torch.dtype) -> Case:
    """The window's keys are always kept, the scores of the others pooled."""
    budget = shape.kept(percent)
    priority = torch.ones(shape.batch_size, shape.kv_len, dtype=torch.uint8)
    priority[:, -shape.num_rows :] = 2
    options = {"priority": priority, "pool_kernel": POOL_KERNEL}

    def ours(x: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        return kvevict.score_and_compact(*x, budget, **options)

    def check(x: AttentionInputs, results: Mapping[str, Any]) -> None:
        (kept_indices, kept_lens, scores), compacted = results[OURS]
        group = shape.group_size  # the last KV head stands for all
        last = (x.query[:, -group:], x.key[:, -1:].clone(), x.value[:, -1:].clone())
        choice, _, expected = reference.score_and_compact(*last, budget, **options)
        check_close(OURS, scores[:, -1:], expected, dtype)
        assert (kept_lens == budget).all()
        check_same_choice(OURS, kept_indices[:, -1:], choice, shape.kv_len, 0.999)
        for before, after in ((x.key, compacted.key), (x.value, compacted.value)):
            moved = peers.gather_rows(before, kept_indices.long())
            assert torch.equal(after[:, :, :budget], moved), "the kept rows are not at the front"
        for name, result in results.items():
            if name != OURS:
                share = SHARE_IN_COMMON[dtype]
                check_same_choice(name, result[2][:, -1:], choice, shape.kv_len, share)

    key_bytes = shape.key_bytes(dtype)
    return Case(
        op="score_and_compact",
        name=f"{shape.name} {percent}% {DTYPE_NAMES[dtype]}",
        make_inputs=lambda: attention_inputs(shape, dtype, with_value=True),
        contenders={
            OURS: ours,
            "eager": lambda x: peers.snapkv_press(*x, budget, POOL_KERNEL),
            "best torch": lambda x: peers.best_composition(*x, budget, POOL_KERNEL),
        },
        check=check,
        stages=(
            Work(shape.matmul_flops, key_bytes, dtype),
            Work(num_bytes=4 * key_bytes * percent // 100, memory="nt_copy"),
        ),
        goals=(times_faster("eager", 5), times_faster("best torch", 2))
        if shape in (A8, A32)
        else (),
        restore=restore,
    )


def restore(overwritten: AttentionInputs, pristine: AttentionInputs) -> None:
    """Fills the cache again."""
    overwritten.key.copy_(pristine.key)
    overwritten.value.copy_(pristine.value)


CASES = [
    make_case(A8, 20, torch.float32),
    make_case(A8, 20, torch.bfloat16),
    make_case(A32, 20, torch.float32),
    make_case(A32, 20, torch.bfloat16),
    make_case(B32K, 20, torch.bfloat16),
]


def test_score_and_compact(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
