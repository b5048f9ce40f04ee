"""The moving ops against nested loops, evict_slots_ against what its contract says."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvevict import reference

NUM_LAYERS, BATCH_SIZE, NUM_KV_HEADS, KV_LEN = 2, 2, 2, 6


def make_lists(num_layers: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return distinct ascending lists of capacity 4 and ragged length, -1 beyond."""
    kept_indices = torch.full((num_layers, BATCH_SIZE, num_heads, 4), -1, dtype=torch.int32)
    kept_lens = torch.empty(num_layers, BATCH_SIZE, num_heads, dtype=torch.int32)
    subsets = itertools.cycle([[0, 2, 3, 5], [1, 4], [], [2, 3, 4], [5]])
    for place in itertools.product(range(num_layers), range(BATCH_SIZE), range(num_heads)):
        subset = next(subsets)
        kept_indices[place][: len(subset)] = torch.tensor(subset, dtype=torch.int32)
        kept_lens[place] = len(subset)
    return kept_indices, kept_lens


def lists_of_every_form() -> list[tuple[Tensor, Tensor]]:
    full = [make_lists(layers, heads) for layers in (1, NUM_LAYERS) for heads in (1, NUM_KV_HEADS)]
    return full + [(indices[0], lens[0]) for indices, lens in full]


def list_of(kept_indices: Tensor, kept_lens: Tensor, layer: int, b: int, h: int) -> list[int]:
    """Return one list without padding, by the broadcast rules in words."""
    if kept_indices.dim() == 3:
        kept_indices, kept_lens = kept_indices[None], kept_lens[None]
    layer = 0 if kept_indices.shape[0] == 1 else layer
    h = 0 if kept_indices.shape[2] == 1 else h
    return kept_indices[layer, b, h].tolist()[: int(kept_lens[layer, b, h])]


@pytest.mark.parametrize("form", range(8))
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("with_pages", [False, True])
def test_broadcast_indices(form: int, with_base: bool, with_pages: bool) -> None:
    kept_indices, kept_lens = lists_of_every_form()[form]
    base = torch.tensor([1, 2, 4, 7, 8, 9], dtype=torch.int32).expand(1, BATCH_SIZE, 1, 6)
    pages = torch.tensor([[9, 3, 5, 0], [2, 8, 1, 7]], dtype=torch.int32)[None]
    actual = reference.broadcast_indices(
        kept_indices,
        kept_lens,
        NUM_LAYERS,
        NUM_KV_HEADS,
        base_indices=base if with_base else None,
        block_tables=pages if with_pages else None,
        page_size=3 if with_pages else 0,
    )
    assert actual.dtype == torch.int32
    for layer, b, h in itertools.product(range(NUM_LAYERS), range(BATCH_SIZE), range(NUM_KV_HEADS)):
        expected = list_of(kept_indices, kept_lens, layer, b, h)
        if with_base:
            expected = [[1, 2, 4, 7, 8, 9][j] for j in expected]
        if with_pages:
            expected = [int(pages[0, b, j // 3]) * 3 + j % 3 for j in expected]
        assert actual[layer, b, h].tolist() == expected + [-1] * (4 - len(expected))


@pytest.mark.parametrize("form", range(8))
def test_gather_and_compact(form: int) -> None:
    kept_indices, kept_lens = lists_of_every_form()[form]
    shape = (BATCH_SIZE, NUM_KV_HEADS, KV_LEN)
    keys = [torch.randn(*shape, 8) for _ in range(NUM_LAYERS)]
    values = [torch.randn(*shape, 16) for _ in range(NUM_LAYERS)]
    gathered = reference.gather_kv(keys, values, kept_indices, kept_lens)
    compacted = [tensor.clone() for tensor in keys], [tensor.clone() for tensor in values]
    reference.compact_kv_(*compacted, kept_indices, kept_lens)

    for which, sources in enumerate([keys, values]):
        for layer, b, h in itertools.product(
            range(NUM_LAYERS), range(BATCH_SIZE), range(NUM_KV_HEADS)
        ):
            rows = list_of(kept_indices, kept_lens, layer, b, h)
            for place in range(4):
                row = gathered[which][layer][b, h, place]
                if place < len(rows):
                    expected = sources[layer][b, h, rows[place]]
                    assert torch.equal(row, expected)
                    assert torch.equal(compacted[which][layer][b, h, place], expected)
                else:
                    assert (row == 0).all()


def test_without_kept_lens_every_entry_counts() -> None:
    source = torch.arange(6.0).view(1, 1, 6, 1)
    kept_indices = torch.tensor([[[1, 4, 5]]], dtype=torch.int32)
    gathered, _ = reference.gather_kv([source], [source], kept_indices)
    assert gathered[0].flatten().tolist() == [1, 4, 5]


@given(kv_len=st.integers(0, 12), data=st.data())
def test_evict_slots(kv_len: int, data: st.DataObject) -> None:
    wanted = st.sets(st.integers(0, max(kv_len - 1, 0)), max_size=kv_len)
    evicted = sorted(data.draw(wanted)) if kv_len else []
    key = torch.arange(14).view(1, 1, 14, 1)
    value = -key
    slots = torch.tensor([*evicted, -1], dtype=torch.int32).view(1, 1, -1)
    reference.evict_slots_([key], [value], slots, torch.tensor([[kv_len]], dtype=torch.int32))
    assert torch.equal(key, -value)
    rows = key.flatten().tolist()
    new_len = kv_len - len(evicted)
    assert sorted(rows[:new_len]) == [row for row in range(kv_len) if row not in evicted]
    in_place = [slot for slot in range(14) if slot not in evicted or slot >= new_len]
    assert [rows[slot] for slot in in_place] == in_place
    moved = [rows[slot] for slot in evicted if slot < new_len]
    assert moved == sorted(moved)


@pytest.mark.parametrize("form", range(8))
def test_evict_slots_of_every_form(form: int) -> None:
    slots, _ = lists_of_every_form()[form]
    for lens_shape in ((BATCH_SIZE, 1), (1, BATCH_SIZE, NUM_KV_HEADS), (NUM_LAYERS, BATCH_SIZE, 1)):
        keys = [torch.arange(6.0).expand(2, 2, -1).clone()[..., None] for _ in range(NUM_LAYERS)]
        values = [key.clone() for key in keys]
        kv_lens = torch.full(lens_shape, KV_LEN, dtype=torch.int32)
        reference.evict_slots_(keys, values, slots, kv_lens)
        for layer, b, h in itertools.product(
            range(NUM_LAYERS), range(BATCH_SIZE), range(NUM_KV_HEADS)
        ):
            lens = (slots >= 0).sum(-1)
            evicted = list_of(slots, lens, layer, b, h)
            left = [row for row in range(KV_LEN) if row not in evicted]
            for cache in (keys[layer], values[layer]):
                assert sorted(cache[b, h, : len(left), 0].tolist()) == left


def test_no_layers() -> None:
    kept_indices, kept_lens = make_lists(1, 1)
    reference.evict_slots_([], [], kept_indices, kept_lens)
    assert reference.gather_kv([], [], kept_indices, kept_lens) == ([], [])
    reference.compact_kv_([], [], kept_indices, kept_lens)
