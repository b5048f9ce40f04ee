"""Dual-attention pruning: one list of the kept keys, from two statistics of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_equal
from bench.harness import Case, Work
from bench.report import OURS, times_faster
from bench.shapes import A8, B32K, B128K, Workload, attention_like_scores
from kvevict import reference

KAPPA, ALPHA = 0.86, 4.0


class Statistics(NamedTuple):
    """sums, maxima [1, 1, kv_len] float32 and candidates [1, kv_len] bool."""

    sums: Tensor
    maxima: Tensor
    candidates: Tensor


def make_inputs(shape: Workload) -> Statistics:
    """Attention with a long tail; `num_rows` tokens of text before and behind the image."""
    sums = attention_like_scores(1, 1, shape.kv_len)
    maxima = sums * torch.rand(1, 1, shape.kv_len)
    position = torch.arange(shape.kv_len)
    text = (position < shape.num_rows) | (position >= shape.kv_len - shape.num_rows)
    return Statistics(sums, maxima, ~text[None])


def stays(x: Statistics, max_evicted: int | None) -> Tensor:
    """Which keys are kept, by the formula."""
    candidates = x.candidates[:, None]
    total = (x.sums * candidates).sum(-1, keepdim=True)
    threshold = KAPPA / candidates.sum(-1, keepdim=True) * total
    evicted = candidates & (x.sums < threshold) & (x.maxima < ALPHA)
    if max_evicted is not None:
        order = x.sums.masked_fill(~evicted, float("inf"))
        lowest = order.topk(max_evicted, largest=False, sorted=False).indices
        evicted = evicted & torch.zeros_like(evicted).scatter(2, lowest, True)
    return ~evicted


def eager(x: Statistics, max_evicted: int | None) -> Tensor:
    """The list of one row."""
    return stays(x, max_evicted).nonzero()[:, 2]


def padded(x: Statistics, max_evicted: int | None) -> Tensor:
    """The same without a size that depends on the data, as the compiler wants it."""
    kv_len = x.sums.shape[2]
    index = torch.arange(kv_len, device=x.sums.device)
    return index.where(stays(x, max_evicted), kv_len).sort(-1).values


def make_case(shape: Workload, percent: int | None = None) -> Case:
    """One row; at most `percent` of its keys may be evicted."""
    max_evicted = None if percent is None else shape.kept(percent)

    def ours(x: Statistics) -> tuple[Tensor, Tensor]:
        return kvevict.select_threshold(*x, kappa=KAPPA, alpha=ALPHA, max_evicted=max_evicted)

    def check(x: Statistics, results: Mapping[str, Any]) -> None:
        expected = reference.select_threshold(*x, kappa=KAPPA, alpha=ALPHA, max_evicted=max_evicted)
        check_equal(OURS, results[OURS], expected)
        # The peers add up in another order: keys next to the threshold may differ.
        kept = torch.isin(torch.arange(shape.kv_len), expected[0])
        for name in results.keys() - {OURS}:
            count = int((kept ^ torch.isin(torch.arange(shape.kv_len), results[name])).sum())
            assert count <= shape.kv_len / 1000, f"{name}: {count} keys differ"

    # Sums, maxima and candidates are read, the list is written.
    num_bytes = shape.kv_len * (4 + 4 + 1 + 4)
    return Case(
        op="select_threshold",
        name=shape.name if percent is None else f"{shape.name}, at most {percent}%",
        make_inputs=lambda: make_inputs(shape),
        contenders={
            OURS: ours,
            "eager": lambda x: eager(x, max_evicted),
            "compile": lambda x: peers.compiled(padded)(x, max_evicted),
        },
        check=check,
        stages=(Work(num_bytes=num_bytes),),
        goals=(times_faster("eager", 3), times_faster("compile", 1)),
    )


CASES = [make_case(A8), make_case(A8, 20), make_case(B32K), make_case(B32K, 20), make_case(B128K)]


def test_select_threshold(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
