"""One list for every layer and head of the model, looked up in earlier lists and in page tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import kvevict
from bench.checks import check_equal
from bench.harness import Case, Work
from bench.report import OURS
from bench.shapes import A32, B32K, Workload, random_kept_indices
from kvevict import reference

PAGE_SIZE = 16

Inputs = dict[str, Tensor]


def plain(shape: Workload, percent: int) -> Case:
    """Copies one list to all layers and heads."""
    k = shape.kept(percent)
    return _case(
        f"{shape.name} {percent}%",
        shape,
        k,
        lambda: _lists(shape.kv_len, k),
        lambda x: _expand(x, shape).contiguous(),
        arguments={},
    )


def composed(shape: Workload) -> Case:
    """Keeps half of what an earlier eviction to 40% has kept, by layer and head."""
    kept_before = shape.kept(40)
    rows = (shape.num_layers, 1, shape.num_kv_heads, shape.kv_len)

    def make_inputs() -> Inputs:
        base = random_kept_indices(rows, kept_before).int()
        return _lists(kept_before, kept_before // 2) | {"base_indices": base}

    return _case(
        f"{shape.name} composed",
        shape,
        kept_before // 2,
        make_inputs,
        lambda x: x["base_indices"].gather(3, _expand(x, shape).long()),
        arguments={},
    )


def paged(shape: Workload, percent: int) -> Case:
    """Translates to the slots of a paged cache."""
    pages = -(-shape.kv_len // PAGE_SIZE)

    def make_inputs() -> Inputs:
        table = torch.stack([torch.randperm(pages) for _ in range(shape.num_layers)])
        return _lists(shape.kv_len, shape.kept(percent)) | {"block_tables": table[:, None].int()}

    def eager(x: Inputs) -> Tensor:
        index = x["kept_indices"].expand(shape.num_layers, -1, -1, -1)
        page = x["block_tables"].gather(2, index[:, :, 0].long() // PAGE_SIZE)
        slots = page.unsqueeze(2) * PAGE_SIZE + index % PAGE_SIZE
        return slots.expand(-1, -1, shape.num_kv_heads, -1).contiguous()

    name = f"{shape.name} {percent}% paged"
    arguments = {"page_size": PAGE_SIZE}
    return _case(name, shape, shape.kept(percent), make_inputs, eager, arguments)


def _case(
    name: str,
    shape: Workload,
    k: int,
    make_inputs: Callable[[], Inputs],
    eager: Callable[[Inputs], Tensor],
    arguments: dict[str, int],
) -> Case:
    layers_and_heads = (shape.num_layers, shape.num_kv_heads)

    def call(function: Callable[..., Tensor], x: Inputs) -> Tensor:
        lists = {key: value for key, value in x.items() if key.startswith("kept")}
        tables = {key: value for key, value in x.items() if not key.startswith("kept")}
        return function(*lists.values(), *layers_and_heads, **tables, **arguments)

    def check(x: Inputs, results: Mapping[str, Tensor]) -> None:
        expected = call(reference.broadcast_indices, x)
        for contender, result in results.items():
            check_equal(contender, [result.int()], [expected])

    return Case(
        op="broadcast_indices",
        name=name,
        make_inputs=make_inputs,
        contenders={OURS: lambda x: call(kvevict.broadcast_indices, x), "eager": eager},
        check=check,
        stages=(Work(num_bytes=4 * shape.num_layers * shape.num_kv_heads * k, memory="nt_copy"),),
    )


def _lists(kv_len: int, k: int) -> Inputs:
    index = random_kept_indices((1, 1, kv_len), k).int()
    return {"kept_indices": index, "kept_lens": torch.full((1, 1), k, dtype=torch.int32)}


def _expand(x: Inputs, shape: Workload) -> Tensor:
    return x["kept_indices"].expand(shape.num_layers, -1, shape.num_kv_heads, -1)


CASES = [plain(A32, 20), plain(B32K, 20), composed(A32), paged(B32K, 20)]


def test_broadcast_indices(run: Callable[[Case], None], case: Case) -> None:
    """Checks and times one case."""
    run(case)
