"""Rows evicted from a growing cache in place: the step of decoding, and many rows at once.

The peers are what is run today, a copy of all that stays (`torch.cat` around one row, as in TGV-KV,
every step; `index_select` for more), and the same moves by torch, in place. Evicting a second time
moves the same bytes to the same places, so nothing has to be filled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvevict
from bench import peers
from bench.checks import check_equal
from bench.harness import Case, Run, Work, clone
from bench.report import OURS, times_faster
from bench.shapes import A8, A32, C, Workload, random_kept_indices
from kvevict import reference


class EvictionInputs(NamedTuple):
    """Keys and values by layer, and the same evictions in the form that each contender takes."""

    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor  # [num_layers, batch_size, 1, m] int32, all of them below kv_len - m
    kv_lens: Tensor  # [batch_size, 1] int32
    holes: Tensor  # [num_layers, m] int64
    survivors: Tensor  # [m] int64
    kept_rows: Tensor  # [num_layers, kv_len - m] int64


def eviction_inputs(shape: Workload, m: int, dtype: torch.dtype) -> EvictionInputs:
    """A cache of `layers_on_cpu` layers; a layer evicts the same slots of all its sequences."""
    num_layers, left = shape.layers_on_cpu, shape.kv_len - m
    size = (shape.batch_size, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    holes = random_kept_indices((num_layers, left), m)
    stays = torch.ones(num_layers, shape.kv_len, dtype=torch.bool).scatter_(1, holes, False)
    kept_rows = stays.nonzero()[:, 1].view(num_layers, left)

    def cache() -> list[Tensor]:
        return [torch.randn(size, dtype=dtype) for _ in range(num_layers)]

    return EvictionInputs(
        cache(),
        cache(),
        holes.int()[:, None, None].repeat(1, shape.batch_size, 1, 1),
        torch.full((shape.batch_size, 1), shape.kv_len, dtype=torch.int32),
        holes,
        torch.arange(left, shape.kv_len),
        kept_rows,
    )


def evict(x: EvictionInputs) -> None:
    """The operator under test."""
    kvevict.evict_slots_(x.keys, x.values, x.slots, x.kv_lens)


def cat(x: EvictionInputs) -> list[Tensor]:
    """New tensors without the evicted row, as TGV-KV makes them every step."""
    slots = x.holes[:, 0].tolist()
    return [
        torch.cat([layer[:, :, :slot], layer[:, :, slot + 1 :]], dim=2)
        for states in (x.keys, x.values)
        for layer, slot in zip(states, slots, strict=True)
    ]


def index_copy(x: EvictionInputs) -> list[Tensor]:
    """The same moves, in place, by torch."""
    return [
        layer.index_copy_(2, holes, layer.index_select(2, x.survivors))
        for states in (x.keys, x.values)
        for layer, holes in zip(states, x.holes, strict=True)
    ]


def index_select(x: EvictionInputs) -> list[Tensor]:
    """New tensors of the rows that stay."""
    return [
        layer.index_select(2, rows)
        for states in (x.keys, x.values)
        for layer, rows in zip(states, x.kept_rows, strict=True)
    ]


def make_case(shape: Workload, m: int) -> Case:
    """bf16; every layer evicts m rows of each head."""

    def check(x: EvictionInputs, results: Mapping[str, Any]) -> None:
        left = shape.kv_len - m
        keys, values = clone(x.keys), clone(x.values)
        reference.evict_slots_(keys, values, x.slots, x.kv_lens)
        moved = [layer[:, :, :left] for layer in (*keys, *values)]
        for name, result in results.items():
            if name == OURS:
                result = [*result[1].keys, *result[1].values]
            copies = name in ("cat", "index_select")
            live = [layer[:, :, :left] for layer in result]
            check_equal(name, live, index_select(x) if copies else moved)

    copied: dict[str, Run] = {"cat": cat} if m == 1 else {"index_select": index_select}
    rows = shape.layers_on_cpu * shape.batch_size * shape.num_kv_heads * m
    layers = f"{shape.layers_on_cpu} of {shape.num_layers} layers"
    return Case(
        op="evict_slots_",
        name=f"{shape.name} {m} of {shape.kv_len}, {layers}",
        make_inputs=lambda: eviction_inputs(shape, m, torch.bfloat16),
        contenders={
            OURS: evict,
            **copied,
            "index_copy": index_copy,
            "compile": lambda x: peers.compiled(index_copy)(x),
        },
        check=check,
        stages=(Work(num_bytes=4 * rows * shape.head_dim * 2, memory="nt_copy"),),
        goals=(times_faster("cat", 100),) if m == 1 else (times_faster("index_select", 1),),
        restore=lambda overwritten, pristine: None,
    )


FOUR = replace(C, name="C/8", batch_size=4)
CASES = [
    make_case(shape, m) for shape, m in ((FOUR, 1), (A8, 1), (A8, 64), (A8, 1490), (A32, 1490))
]


def test_evict_slots(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
