"""Keys rotated to the positions inside an evicted cache, several layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_rounded
from bench.harness import Case, Work
from bench.report import OURS, times_faster
from bench.shapes import A8, A32, B32K, Workload, random_kept_indices
from kvevict import reference

GOALS = (times_faster("eager", 5), times_faster("compile", 2))


class Inputs(NamedTuple):
    """Keys by layer and where they come from and go to.

    Positions are [batch_size, kv_len], or old ones by layer and head.
    """

    keys: list[Tensor]
    old_positions: Tensor
    new_positions: Tensor
    inv_freq: Tensor


def make_case(shape: Workload, *, by_head: bool = False) -> Case:
    """bf16; a cache of kv_len tokens that were kept of twice as many."""
    layers = shape.layers_on_cpu
    heads = (layers, shape.batch_size, shape.num_kv_heads) if by_head else (shape.batch_size,)

    def make_inputs() -> Inputs:
        size = (shape.batch_size, shape.num_kv_heads, shape.kv_len, shape.head_dim)
        old_positions = random_kept_indices((*heads, 2 * shape.kv_len), shape.kv_len)
        new_positions = torch.arange(shape.kv_len, dtype=torch.int32)
        return Inputs(
            [torch.randn(size, dtype=torch.bfloat16) for _ in range(layers)],
            old_positions.int(),
            new_positions.expand(shape.batch_size, -1).contiguous(),
            10_000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim),
        )

    def check(x: Inputs, results: Mapping[str, Any]) -> None:
        last = x.keys[-1][-1:, -1:].double()  # sequence, head and layer stand for all
        old_positions = x.old_positions[-1:, -1:, -1:] if by_head else x.old_positions[-1:]
        reference.rerotate_keys_([last], old_positions, x.new_positions[-1:], x.inv_freq)
        for name, result in results.items():
            keys = result[1].keys if name == OURS else result
            check_rounded(name, keys[-1][-1:, -1:], last)

    moved = f"{shape.name}{' by head' if by_head else ''}, {layers} of {shape.num_layers} layers"
    return Case(
        op="rerotate_keys_",
        name=moved,
        make_inputs=make_inputs,
        contenders={
            OURS: lambda x: kvevict.rerotate_keys_(*x),
            "eager": lambda x: peers.rerotate(*x),
            "compile": lambda x: peers.compiled(peers.rerotate)(*x),
        },
        check=check,
        stages=(Work(num_bytes=2 * layers * shape.key_bytes(torch.bfloat16), memory="copy"),),
        goals=GOALS,
        restore=restore,
    )


def restore(overwritten: Inputs, pristine: Inputs) -> None:
    """Puts the keys back."""
    torch._foreach_copy_(overwritten.keys, pristine.keys)


CASES = [make_case(A8), make_case(A8, by_head=True), make_case(A32), make_case(B32K)]


def test_rerotate_keys(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
