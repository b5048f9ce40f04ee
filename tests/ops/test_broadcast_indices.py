"""broadcast_indices: exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, to_cpu
from tests.support.samples import Arguments
from tests.support.shapes import make_lists

OP = "broadcast_indices"
NUM_LAYERS, BATCH_SIZE, NUM_KV_HEADS, BASE_LEN, PAGE_SIZE = 3, 2, 4, 50, 16
LENS = (17, 3, 0, 20)


def assert_exact(backend: Backend, arguments: Arguments) -> Any:
    actual = backend.op(OP)(**arguments)
    assert_same_bytes(actual, reference.broadcast_indices(**to_cpu(arguments)))
    return actual


def make_call(device: str, *outer: int, k: int = 20) -> Arguments:
    kept_indices, kept_lens = make_lists((*outer, k), BASE_LEN, LENS, device=device)
    return {
        "kept_indices": kept_indices,
        "kept_lens": kept_lens,
        "num_layers": NUM_LAYERS,
        "num_kv_heads": NUM_KV_HEADS,
    }


@pytest.mark.parametrize(
    "outer",
    [(BATCH_SIZE, heads) for heads in (1, NUM_KV_HEADS)]
    + [(layers, BATCH_SIZE, heads) for layers in (1, NUM_LAYERS) for heads in (1, NUM_KV_HEADS)],
    ids=str,
)
@pytest.mark.parametrize("base", [None, (1, 1), (1, NUM_KV_HEADS), (NUM_LAYERS, 1)], ids=str)
@pytest.mark.parametrize("page_layers", [0, 1, NUM_LAYERS])
def test_every_form(
    backend: Backend, outer: tuple[int, ...], base: tuple[int, int] | None, page_layers: int
) -> None:
    arguments = make_call(backend.device, *outer)
    if base is not None:
        base_shape = (base[0], BATCH_SIZE, base[1], BASE_LEN)
        lists, _ = make_lists(base_shape, 90, (BASE_LEN,), device=backend.device)
        arguments["base_indices"] = lists
    if page_layers:
        table = torch.randperm(page_layers * BATCH_SIZE * 6, dtype=torch.int32)
        arguments["block_tables"] = table.view(page_layers, BATCH_SIZE, 6).to(backend.device)
        arguments["page_size"] = PAGE_SIZE
    assert_exact(backend, arguments)


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_page_sizes(backend: Backend, page_size: int) -> None:
    arguments = make_call(backend.device, BATCH_SIZE, 1)
    num_pages = -(-BASE_LEN // page_size)
    table = torch.randint(0, 1000, (1, BATCH_SIZE, num_pages), dtype=torch.int32)
    arguments |= {"block_tables": table.to(backend.device), "page_size": page_size}
    assert_exact(backend, arguments)


def test_composition_of_two_evictions_is_one(backend: Backend) -> None:
    """Gathering twice by two lists is gathering once by the composed list."""
    op = backend.op
    cache = torch.randn(BATCH_SIZE, NUM_KV_HEADS, BASE_LEN, 8, device=backend.device)
    sizes = (BATCH_SIZE, NUM_KV_HEADS)
    first, _ = make_lists((*sizes, 30), BASE_LEN, (30,), device=backend.device)
    second, lens = make_lists((*sizes, 20), 30, LENS, device=backend.device)
    composed = op(OP)(second, lens, 1, NUM_KV_HEADS, base_indices=first[None])
    ((once,), _) = op("gather_kv")([cache], [cache], composed, lens[None])
    ((halfway,), _) = op("gather_kv")([cache], [cache], first)
    ((twice,), _) = op("gather_kv")([halfway], [halfway], second, lens)
    assert_same_bytes(once, twice)


def test_beyond_kept_lens_anything_may_stand(backend: Backend) -> None:
    arguments = make_call(backend.device, BATCH_SIZE, NUM_KV_HEADS)
    base, _ = make_lists((1, BATCH_SIZE, 1, BASE_LEN), 90, (BASE_LEN,), device=backend.device)
    expected = assert_exact(backend, {**arguments, "base_indices": base})
    index = torch.arange(20, device=backend.device)
    beyond = index >= arguments["kept_lens"][..., None]
    arguments["kept_indices"] = arguments["kept_indices"].masked_fill(beyond, 2**30)
    assert_same_bytes(assert_exact(backend, {**arguments, "base_indices": base}), expected)


@pytest.mark.parametrize("batch_size", [0, 2])
@pytest.mark.parametrize("k", [0, 5])
def test_empty(backend: Backend, batch_size: int, k: int) -> None:
    kept_indices, kept_lens = make_lists((batch_size, 1, k), 9, (0,), device=backend.device)
    result = backend.op(OP)(kept_indices, kept_lens, 3, 2)
    assert_same_bytes(result, kept_indices[None].expand(3, batch_size, 2, k))


def test_missing_entries_stay_missing(backend: Backend) -> None:
    """-1 in the list of an earlier eviction, or for a page that was never allocated."""
    kept_indices, kept_lens = make_lists((BATCH_SIZE, 1, 8), 12, (8,), device=backend.device)
    base, _ = make_lists((1, BATCH_SIZE, 1, 12), 40, (7,), device=backend.device)
    table = torch.tensor([[[3, -1, 8], [-1, 2, 5]]], dtype=torch.int32, device=backend.device)
    arguments = {
        "kept_indices": kept_indices,
        "kept_lens": kept_lens,
        "num_layers": NUM_LAYERS,
        "num_kv_heads": NUM_KV_HEADS,
    }
    both = {"base_indices": base, "block_tables": table, "page_size": PAGE_SIZE}
    for extra in ({"base_indices": base}, both):
        result = assert_exact(backend, arguments | extra)
        assert ((result == -1).any(-1) & (result >= 0).any(-1)).all()
