"""A decoding step's attention added to the running scores of the keys, one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS, times_faster
from bench.shapes import A8, A32, B32K, Workload, attention_inputs, attention_like_scores
from kvevict import reference

DECAY = 0.98
GOALS = (times_faster("eager", 2), times_faster("compile", 1))


class Inputs(NamedTuple):
    """A query row of each sequence, its keys, and scores [batch_size, num_kv_heads, kv_len]."""

    scores: Tensor
    query: Tensor
    key: Tensor


def make_case(shape: Workload, dtype: torch.dtype) -> Case:
    """Peers return new scores: what they do beside is the same."""
    shape = replace(shape, num_rows=1)

    def make_inputs() -> Inputs:
        scores = attention_like_scores(shape.batch_size, shape.num_kv_heads, shape.kv_len)
        inputs = attention_inputs(shape, dtype)
        return Inputs(scores, inputs.query, inputs.key)

    def check(x: Inputs, results: Mapping[str, Any]) -> None:
        group = shape.group_size  # the last sequence and KV head stand for all
        expected = x.scores[-1:, -1:].double()
        last = (x.query[-1:, -group:], x.key[-1:, -1:])
        reference.accumulate_scores_(expected, *last, decay=DECAY)
        for name, result in results.items():
            scores = result[1].scores if name == OURS else result
            check_close(name, scores[-1:, -1:], expected, dtype)

    num_scores = shape.batch_size * shape.num_kv_heads * shape.kv_len
    return Case(
        op="accumulate_scores_",
        name=shape.name,
        make_inputs=make_inputs,
        contenders={
            OURS: lambda x: kvevict.accumulate_scores_(*x, decay=DECAY),
            "eager": lambda x: peers.accumulated_scores(*x, DECAY),
            "compile": lambda x: peers.compiled(peers.accumulated_grouped_scores)(*x, DECAY),
        },
        check=check,
        stages=(Work(shape.matmul_flops, shape.key_bytes(dtype) + 8 * num_scores, dtype),),
        goals=GOALS,
        restore=restore,
    )


def restore(overwritten: Inputs, pristine: Inputs) -> None:
    """Puts the old scores back."""
    overwritten.scores.copy_(pristine.scores)


CASES = [make_case(shape, torch.bfloat16) for shape in (A8, A32, B32K)]


def test_accumulate_scores(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
