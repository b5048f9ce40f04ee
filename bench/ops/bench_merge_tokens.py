"""Evicted keys and values of a layer merged into kept ones, in place; alone and as a whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import relative_error
from bench.harness import Case, Work
from bench.report import OURS, times_faster
from bench.shapes import A8, A32, B32K, DTYPE_NAMES, MergeInputs, Workload, merge_inputs
from kvevict import reference

# A result of 16 bits, or its sum in another order, is within a rounding of the oracle's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def check_rows(contender: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Holds the last sequence and head of keys and values against the oracle."""
    for mine, wanted in zip(actual, expected, strict=True):
        error = relative_error(mine[-1:, -1:], wanted)
        limit = TOLERANCE[mine.dtype]
        assert error <= limit, f"{contender}: relative error {error:.2e} exceeds {limit:.0e}"


def merged_bytes(shape: Workload, percent: int, dtype: torch.dtype) -> float:
    """Bytes of reading all keys and values and writing the kept ones."""
    return 2 * shape.key_bytes(dtype) * (1 + percent / 100)


def restore(overwritten: MergeInputs, pristine: MergeInputs) -> None:
    """Fills the cache again."""
    overwritten.key.copy_(pristine.key)
    overwritten.value.copy_(pristine.value)


def make_case(shape: Workload, percent: int, dtype: torch.dtype) -> Case:
    """Given the matches."""

    def check(x: MergeInputs, results: Mapping[str, Any]) -> None:
        expected = [tensor[-1:, -1:].double() for tensor in (x.key, x.value)]
        lists = (tensor[-1:, -1:] for tensor in (x.evicted, x.match, x.weight))
        reference.merge_tokens_(expected, *lists)
        for name, result in results.items():
            check_rows(name, [*result[1][:2]] if name == OURS else result, expected)

    def ours(x: MergeInputs) -> None:
        kvevict.merge_tokens_([x.key, x.value], x.evicted, x.match, x.weight)

    return Case(
        op="merge_tokens_",
        name=f"{shape.name} {percent}% {DTYPE_NAMES[dtype]}",
        make_inputs=lambda: merge_inputs(shape, percent, dtype),
        contenders={OURS: ours, "eager": peers.merge_cache},
        check=check,
        stages=(Work(num_bytes=merged_bytes(shape, percent, dtype), memory="nt_copy"),),
        goals=(times_faster("eager", 4),),
        restore=restore,
    )


def make_whole_case(shape: Workload, percent: int, dtype: torch.dtype) -> Case:
    """Match, merge and compact: what kvpress' merging does for a layer."""
    k = shape.kept(percent)
    pairs = shape.batch_size * shape.num_kv_heads * (shape.kv_len - k) * k

    def check(x: MergeInputs, results: Mapping[str, Any]) -> None:
        key, value, kept, evicted = (
            tensor[-1:, -1:] for tensor in (x.key, x.value, x.kept, x.evicted)
        )
        match, _ = reference.match_tokens(key, evicted, kept)
        expected = [key.double(), value.double()]
        reference.merge_tokens_(expected, evicted, match, torch.ones(1, 1, shape.kv_len))
        expected = [peers.gather_rows(tensor, kept.long()) for tensor in expected]
        for name, result in results.items():
            rows = [tensor[:, :, :k] for tensor in result[1][:2]] if name == OURS else result
            check_rows(name, rows, expected)

    def ours(x: MergeInputs) -> None:
        match, _ = kvevict.match_tokens(x.key, x.evicted, x.kept)
        ones = torch.ones(shape.batch_size, 1, shape.kv_len, device=x.key.device)
        kvevict.merge_tokens_([x.key, x.value], x.evicted, match, ones)
        kvevict.compact_kv_([x.key], [x.value], x.kept)

    return Case(
        op="merge_tokens_",
        name=f"{shape.name} {percent}% {DTYPE_NAMES[dtype]}, with match and compaction",
        make_inputs=lambda: merge_inputs(shape, percent, dtype),
        contenders={
            OURS: ours,
            "press": lambda x: peers.merging_press(x.key, x.value, x.kept),
        },
        check=check,
        stages=(
            Work(2 * pairs * shape.head_dim, shape.key_bytes(dtype), dtype),
            Work(num_bytes=merged_bytes(shape, percent, dtype), memory="nt_copy"),
            Work(num_bytes=4 * shape.key_bytes(dtype) * percent / 100, memory="nt_copy"),
        ),
        goals=(times_faster("press", 4),),
        restore=restore,
    )


CASES = [
    make_case(A8, 20, torch.bfloat16),
    make_case(A32, 20, torch.bfloat16),
    make_case(B32K, 20, torch.bfloat16),
    make_whole_case(A8, 20, torch.float32),
    make_whole_case(A8, 20, torch.bfloat16),
    make_whole_case(A32, 20, torch.bfloat16),
]


def test_merge_tokens(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
