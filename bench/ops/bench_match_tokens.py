"""The nearest kept key of every evicted one of a layer, and of hidden states in windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_close
from bench.harness import Case, Work
from bench.report import OURS, fraction_of_peak, times_faster
from bench.shapes import A8, A32, DTYPE_NAMES, MergeInputs, Workload, merge_inputs
from kvevict import reference

Result = tuple[Tensor, Tensor]
LEAST_EQUAL = 0.999  # of matches; the others are as near but for the rounding


def check_result(contender: str, actual: Result, expected: Result, dtype: torch.dtype) -> None:
    """Holds matches and similarities against the oracle."""
    check_close(contender, actual[1], expected[1], dtype)
    equal = float((actual[0] == expected[0]).float().mean())
    least = LEAST_EQUAL if contender == OURS or dtype == torch.float32 else 0.9
    assert equal >= least, f"{contender}: only {equal:.1%} of the matches are right"


def make_case(shape: Workload, percent: int, dtype: torch.dtype) -> Case:
    """One layer: all evicted keys of a head against all kept ones."""
    k = shape.kept(percent)
    pairs = shape.batch_size * shape.num_kv_heads * (shape.kv_len - k) * k

    def check(x: MergeInputs, results: Mapping[str, Any]) -> None:
        # The last sequence and head stand for all.
        last = [tensor[-1:, -1:] for tensor in (x.key, x.evicted, x.kept)]
        expected = reference.match_tokens(*last)
        for name, result in results.items():
            mine = (result[0][-1:, -1:], result[1][-1:, -1:])
            check_result(name, mine, expected, torch.float32)

    return Case(
        op="match_tokens",
        name=f"{shape.name} {percent}% {DTYPE_NAMES[dtype]}",
        make_inputs=lambda: merge_inputs(shape, percent, dtype),
        contenders={
            OURS: lambda x: kvevict.match_tokens(x.key, x.evicted, x.kept),
            "eager": peers.nearest_kept,
            "compile": lambda x: peers.compiled(peers.nearest_kept)(x),
        },
        check=check,
        stages=(Work(2 * pairs * shape.head_dim, shape.key_bytes(dtype), dtype),),
        goals=(fraction_of_peak(0.5), times_faster("eager", 2)),
    )


class WindowInputs(NamedTuple):
    """Hidden states [batch_size, 1, num_tokens, dim], and the members of equally large windows."""

    tokens: Tensor
    sources: Tensor  # [batch_size, num_windows, size] int32
    targets: Tensor
    source_group: Tensor  # [batch_size, 1, num_windows * size] int32
    target_group: Tensor


def make_window_case(side: int, num_windows: int, dim: int, dtype: torch.dtype) -> Case:
    """LightKV: an image of side x side tokens in num_windows x num_windows windows."""
    width = side // num_windows
    num_members = width * width // 2

    def make_inputs() -> WindowInputs:
        grid = torch.arange(side * side, dtype=torch.int32).view(side, side)
        windows = grid.unfold(0, width, width).unfold(1, width, width).flatten(2).flatten(0, 1)
        group = torch.arange(len(windows), dtype=torch.int32).repeat_interleave(num_members)
        return WindowInputs(
            torch.randn(1, 1, side * side, dim).to(dtype),
            windows[None, :, ::2],
            windows[None, :, 1::2],
            group[None, None],
            group[None, None],
        )

    def ours(x: WindowInputs) -> Result:
        return kvevict.match_tokens(
            x.tokens,
            x.sources.view(1, 1, -1),
            x.targets.view(1, 1, -1),
            source_group=x.source_group,
            target_group=x.target_group,
        )

    def check(x: WindowInputs, results: Mapping[str, Any]) -> None:
        expected = reference.match_tokens(
            x.tokens,
            x.sources.reshape(1, 1, -1),
            x.targets.reshape(1, 1, -1),
            source_group=x.source_group,
            target_group=x.target_group,
        )
        for name, result in results.items():
            mine = (result[0].reshape(1, 1, -1), result[1].reshape(1, 1, -1))
            check_result(name, (mine[0], mine[1].float()), expected, dtype)

    pairs = num_windows**2 * num_members**2
    return Case(
        op="match_tokens",
        name=f"{side}x{side} tokens, {num_windows}x{num_windows} windows {DTYPE_NAMES[dtype]}",
        make_inputs=make_inputs,
        contenders={
            OURS: ours,
            "eager": lambda x: peers.nearest_in_windows(x.tokens, x.sources, x.targets),
        },
        check=check,
        stages=(Work(2 * pairs * dim, side * side * dim * dtype.itemsize, dtype),),
    )


CASES = [
    make_case(A8, 20, torch.float32),
    make_case(A8, 20, torch.bfloat16),
    make_case(A32, 20, torch.bfloat16),
    make_window_case(24, 4, 4096, torch.bfloat16),
    make_window_case(24, 1, 4096, torch.bfloat16),
]


def test_match_tokens(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
