"""evict_slots_: every live byte is exact, and nothing but the holes is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.reference.evict_slots import expand_slots, list_moves
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, clone, outcome, to_cpu
from tests.support.moving import DTYPES, HEAD_DIMS, LAYOUTS, make_caches, storage_bytes
from tests.support.samples import Arguments

OP = "evict_slots_"
LIST_FORMS = ((2, 1), (1, 2, 3), (2, 2, 1), (2, 2, 3))
LENS_FORMS = ((2, 1), (2, 3), (1, 2, 1), (2, 2, 3))
# Capacity, kv_len, m and how many are evicted: nothing, one, some, all.
SIZES = (
    (0, 0, 0, 0),
    (9, 0, 2, 0),
    (9, 9, 0, 0),
    (9, 5, 1, 1),
    (9, 1, 1, 1),
    (9, 9, 30, 9),
    (200, 150, 70, 33),
    (3000, 2999, 2999, 1500),
)


def choose_slots(kv_len: int, count: int) -> Tensor:
    """Return `count` of the first `kv_len` slots, ascending."""
    return torch.randperm(kv_len)[:count].sort().values


def make_slots(
    kv_lens: Tensor, outer: tuple[int, ...], m: int, counts: Iterable[int], device: str
) -> Tensor:
    """Return lists [*outer, m] of lengths that cycle over `counts`, for the shortest of kv_lens."""
    counts = list(counts)
    shortest = int(kv_lens.min()) if kv_lens.numel() else 0
    slots = torch.full((*outer, m), -1, dtype=torch.int32)
    flat = slots.view(math.prod(outer), m)
    for place in range(math.prod(outer)):
        chosen = choose_slots(shortest, min(counts[place % len(counts)], m, shortest))
        flat[place, : len(chosen)] = chosen
    return slots.to(device)


def eviction_arguments(
    device: str,
    outer: tuple[int, ...] = (2, 2, 3),
    lens_outer: tuple[int, ...] = (2, 2, 3),
    *,
    capacity: int = 45,
    kv_lens: Iterable[int] = (45, 30),
    m: int = 20,
    counts: Iterable[int] = (20, 1, 7, 0),
    **caches: object,
) -> Arguments:
    """Return caches of `make_caches` and random evictions."""
    lens = list(kv_lens)
    keys, values = make_caches(device, kv_len=capacity, **caches)  # type: ignore[arg-type]
    lens_of_lists = torch.tensor([lens[i % len(lens)] for i in range(math.prod(lens_outer))])
    lens_tensor = lens_of_lists.int().view(lens_outer)
    return {
        "keys": keys,
        "values": values,
        "slots": make_slots(lens_tensor, outer, m, counts, device),
        "kv_lens": lens_tensor.to(device),
    }


def _layers_of_different_size(device: str) -> Arguments:
    arguments = eviction_arguments(device, (2, 2, 1), (1, 2, 1), capacity=45, head_dim=8)
    long = make_caches(device, num_layers=1, kv_len=400, head_dim=64, value_dim=24)
    arguments["keys"][1:], arguments["values"][1:] = long
    return arguments


def _cases() -> dict[str, Callable[[str], Arguments]]:
    calls: dict[str, dict[str, object]] = {}
    for dtype, layout in product(DTYPES, LAYOUTS):
        calls[f"{dtype}-{layout}"] = {"dtype": dtype, "layout": layout}
    for head_dim, dtype in product(HEAD_DIMS, (torch.uint8, torch.float32)):
        sizes = {"head_dim": head_dim, "value_dim": head_dim + 5}
        calls[f"head_dim_{head_dim}-{dtype}"] = {**sizes, "dtype": dtype}
    for outer, lens_outer in product(LIST_FORMS, LENS_FORMS):
        calls[f"lists_{outer}-lens_{lens_outer}"] = {"outer": outer, "lens_outer": lens_outer}
    for capacity, kv_len, m, count in SIZES:
        calls[f"{count}_of_{kv_len}"] = {
            "capacity": capacity,
            "kv_lens": (kv_len,),
            "m": m,
            "counts": (count, count // 2),
        }
    calls["batch_0"] = {"batch_size": 0, "outer": (0, 3), "lens_outer": (0, 1)}
    calls["more_tensors_than_a_launch_takes"] = {
        "num_layers": 33,
        "outer": (33, 2, 1),
        "lens_outer": (2, 1),
        "head_dim": 8,
    }

    def maker(call: dict[str, object]) -> Callable[[str], Arguments]:
        return lambda device: eviction_arguments(device, **call)  # type: ignore[arg-type]

    cases = {name: maker(call) for name, call in calls.items()}
    return {**cases, "layers_of_different_size": _layers_of_different_size}


CASES = _cases()


def assert_exact(backend: Backend, arguments: Arguments) -> None:
    expected = outcome(reference.evict_slots_, to_cpu(arguments))
    assert_same_bytes(outcome(backend.op(OP), arguments), expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("case", CASES)
def test_matches_oracle(backend: Backend, case: str) -> None:
    assert_exact(backend, CASES[case](backend.device))


RUNS = {
    "head": torch.arange(600),
    "tail": torch.arange(400, 1000),
    "every_second": torch.arange(0, 1000, 2),
    "head_and_tail": torch.cat([torch.arange(10), torch.arange(900, 1000)]),
    "all": torch.arange(1000),
    "newest": torch.tensor([999]),
    "oldest": torch.tensor([0]),
}


@pytest.mark.every_isa
@pytest.mark.parametrize("runs", RUNS)
def test_runs_of_slots(backend: Backend, runs: str) -> None:
    """Where holes and survivors stand side by side, and where nothing has to move at all."""
    keys, values = make_caches(backend.device, kv_len=1003, head_dim=64)
    slots = RUNS[runs].to(backend.device, torch.int32).expand(2, 1, -1)
    kv_lens = torch.full((2, 1), 1000, dtype=torch.int32, device=backend.device)
    assert_exact(backend, {"keys": keys, "values": values, "slots": slots, "kv_lens": kv_lens})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_holes_are_written(backend: Backend, layout: str) -> None:
    """All other bytes stay as they were, those around a slice of a larger buffer too."""
    arguments = eviction_arguments(backend.device, layout=layout)
    caches = [*arguments["keys"], *arguments["values"]]
    before = [storage_bytes(cache).clone() for cache in caches]
    backend.op(OP)(**arguments)
    lists, lens = expand_slots(arguments["slots"], arguments["kv_lens"], 2, 3)
    for cache, old, layer in zip(caches, before, [0, 1, 0, 1], strict=True):
        new = storage_bytes(cache).clone()
        storage_bytes(cache).fill_(1)
        for b, h in product(range(2), range(3)):
            evicted = [slot for slot in lists[layer, b, h].tolist() if slot >= 0]
            for hole, _ in list_moves(evicted, int(lens[layer, b, h])):
                cache[b, h, hole] = 0
        others = storage_bytes(cache) == 1
        assert 0 < others.sum() < others.numel()
        assert_same_bytes(new[others], old[others])


def test_decoding_with_positions(backend: Backend) -> None:
    """A row comes and a row goes, again and again; positions and scores travel with their keys."""
    device, size = backend.device, (2, 3, 9)
    key = torch.zeros(*size, 8, device=device)
    value = torch.zeros(*size, 16, dtype=torch.bfloat16, device=device)
    position = torch.zeros(*size, 1, dtype=torch.int32, device=device)
    score = torch.zeros(*size, 1, device=device)
    cache = (key, value, position, score)
    kv_lens = torch.zeros(2, 1, dtype=torch.int32, device=device)
    slots = torch.full((2, 3, 1), -1, dtype=torch.int32, device=device)
    live: list[list[list[int]]] = [[[] for _ in range(3)] for _ in range(2)]
    for step in range(40):
        new_slot = int(kv_lens[0])
        for tensor in cache:
            tensor[:, :, new_slot] = step
        kv_lens += 1
        for of_sequence in live:
            for of_head in of_sequence:
                of_head.append(step)
        if new_slot + 1 < size[2]:
            continue
        slots[:] = torch.randint(0, size[2], slots.shape, device=device)
        for b, h in product(range(2), range(3)):
            live[b][h].remove(int(position[b, h, int(slots[b, h])]))
        backend.op(OP)([key, position], [value, score], slots, kv_lens)
        kv_lens -= 1
        for b, h in product(range(2), range(3)):
            left = position[b, h, : size[2] - 1]
            assert sorted(left.flatten().tolist()) == live[b][h]
            for tensor in cache:
                assert_same_bytes(
                    tensor[b, h, : size[2] - 1], left.expand_as(tensor[b, h, 1:]).to(tensor.dtype)
                )


def test_keys_of_no_width(backend: Backend) -> None:
    """A sidecar alone: its partner has rows of no bytes."""
    position = torch.arange(12, dtype=torch.int64, device=backend.device).view(1, 2, 6, 1)
    slots = torch.tensor([[[1, 4]]], dtype=torch.int32, device=backend.device)
    kv_lens = torch.tensor([[6]], dtype=torch.int32, device=backend.device)
    backend.op(OP)([position], [position.new_empty(1, 2, 6, 0)], slots, kv_lens)
    assert position[0, :, :4, 0].tolist() == [[0, 5, 2, 3], [6, 11, 8, 9]]


def test_same_rows_as_compaction(backend: Backend) -> None:
    """What is evicted here and what compact_kv_ keeps are the same rows, but for their order."""
    keys, values = make_caches(backend.device, kv_len=300, head_dim=8)
    stable = clone((keys, values))
    evicted = choose_slots(300, 100)
    kept = torch.tensor([slot for slot in range(300) if slot not in evicted])
    slots, kept = (t.to(backend.device, torch.int32).expand(2, 1, -1) for t in (evicted, kept))
    kv_lens = torch.full((2, 1), 300, dtype=torch.int32, device=backend.device)
    backend.op(OP)(keys, values, slots, kv_lens)
    backend.op("compact_kv_")(*stable, kept)
    for mine, theirs in zip([*keys, *values], [*stable[0], *stable[1]], strict=True):
        first = mine[:, :, :200, 0].sort(-1).values
        assert_same_bytes(first, theirs[:, :, :200, 0].sort(-1).values)


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Rows of one head more than 2**31 bytes apart; only the pages in use are ever touched."""
    whole = torch.empty(2**32 + 64, dtype=torch.uint8, device=backend.device)
    key = whole.as_strided((1, 1, 3, 64), (0, 0, 2**31, 1))
    key.copy_(torch.arange(3 * 64).view(1, 1, 3, 64))
    value = torch.arange(9, dtype=torch.uint8, device=backend.device).view(1, 1, 3, 3)
    slots = torch.tensor([[[1]]], dtype=torch.int32, device=backend.device)
    kv_lens = torch.tensor([[3]], dtype=torch.int32, device=backend.device)
    backend.op(OP)([key], [value], slots, kv_lens)
    assert key[0, 0, 1].tolist() == list(range(128, 192))
    assert value[0, 0, :2].flatten().tolist() == [0, 1, 2, 6, 7, 8]


def test_a_lazy_clone_gets_memory_of_its_own(backend: Backend) -> None:
    original = torch.randn(1, 2, 9, 8, device=backend.device)
    before = original.clone()
    key, value = torch._lazy_clone(original), torch._lazy_clone(original)
    slots = torch.tensor([[[2]]], dtype=torch.int32, device=backend.device)
    kv_lens = torch.tensor([[9]], dtype=torch.int32, device=backend.device)
    backend.op(OP)([key], [value], slots, kv_lens)
    assert torch.equal(original, before)
    assert torch.equal(key[:, :, 2], before[:, :, 8])


@pytest.mark.parametrize("argument", ["slots", "kv_lens"])
def test_lists_must_not_lie_in_the_cache(backend: Backend, argument: str) -> None:
    key = torch.arange(256, dtype=torch.int32, device=backend.device).view(1, 1, 32, 8)
    before = key.clone()
    lists = {"slots": key.new_tensor([[[1, 2]]]), "kv_lens": key.new_tensor([[9]])}
    in_cache = {"slots": key.view(1, 1, 256)[:, :, 1:3], "kv_lens": key.view(1, 1, 256)[:, :, 9]}
    lists[argument] = in_cache[argument]
    with pytest.raises(ValueError, match=f"{argument} must not overlap keys"):
        backend.op(OP)([key], [key.clone()], **lists)
    assert torch.equal(key, before)
