"""Layers whose older keys lack channels: what is stored and attended, in float64 by loops."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict.channels import ROW_BLOCK, PackedSlots, attend_with_lse, pack_slots, split_recent
from kvevict.policies import Selection
from kvevict.slots import COLUMN, SLACK_SHARE, Slots

BATCH_SIZE, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM = 3, 2, 8, 4
KV_LEN, NUM_RECENT, SM_SCALE = 60, 6, 0.3
CHANNELS = torch.tensor([[[0, 3, 7], [1, 2, 3]], [[4, 5, 6], [0, 1, 2]], [[2, 4, 6], [5, 6, 7]]])
LENS = {
    "equal": [[20, 20]] * 3,
    "shared": [[20], [18], [19]],
    "shared_buckets": [[40], [5], [12]],
    "per_head": [[21, 20], [19, 18], [20, 20]],
    "buckets": [[40, 12], [5, 3], [1, 33]],
}
attend = partial(attend_with_lse, sm_scale=SM_SCALE)


def make_layer(
    lens_name: str, num_recent: int = NUM_RECENT
) -> tuple[PackedSlots, list[list[int]], Tensor, Tensor]:
    """Return a packed layer, the columns of each list, and the keys and values of the prompt."""
    lens = torch.tensor(LENS[lens_name])
    num_lists = lens.shape[1]
    keys = torch.randn(BATCH_SIZE, NUM_KV_HEADS, KV_LEN, HEAD_DIM)
    values = torch.randn(BATCH_SIZE, NUM_KV_HEADS, KV_LEN, VALUE_DIM)
    column = torch.arange(KV_LEN, dtype=torch.int32)
    tags = torch.stack([column, column, column % 3], -1).expand(BATCH_SIZE, 1, -1, -1)
    kept = torch.full((BATCH_SIZE, num_lists, int(lens.max())), -1, dtype=torch.int32)
    lists = []
    for b in range(BATCH_SIZE):
        for h in range(num_lists):
            own = torch.randperm(KV_LEN)[: int(lens[b, h])].sort().values
            kept[b, h, : len(own)] = own
            lists.append(own.tolist())
    block = Slots(
        keys,
        values,
        tags.contiguous(),
        seen_len=KV_LEN,
        padding_lens=torch.zeros(BATCH_SIZE, dtype=torch.int32),
        has_empty=False,
    )
    ragged = int(lens.min()) < int(lens.max())
    selection = Selection(kept, lens.int(), ragged=ragged)
    layer = pack_slots(block, selection, CHANNELS.int(), num_recent=num_recent)
    return layer, lists, keys, values


def columns_of(layer: PackedSlots) -> list[list[int]]:
    """Return the columns of every list in turn."""
    return [
        [c for c in own if c >= 0] for lists in layer.tags()[..., COLUMN].tolist() for own in lists
    ]


def per_sequence(lists: list[list[int]]) -> list[list[list[int]]]:
    """Return the lists of every sequence, head by head."""
    num_lists = len(lists) // BATCH_SIZE
    return [lists[h::num_lists] for h in range(num_lists)]


def attend_by_loops(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lists: list[list[int]],
    mask: Tensor | None,
    num_recent: int = NUM_RECENT,
) -> Tensor:
    """Attend with every row, key by key [batch_size, qo_len, num_qo_heads, VALUE_DIM].

    `lists` are the columns that the prompt left, `keys` and `values` those of all columns.
    """
    batch_size, num_qo_heads, qo_len, _ = query.shape
    seen_len, group_size = keys.shape[2], num_qo_heads // NUM_KV_HEADS
    output = torch.zeros(batch_size, qo_len, num_qo_heads, VALUE_DIM, dtype=torch.float64)
    for b in range(batch_size):
        for h in range(num_qo_heads):
            g = h // group_size
            own = lists[b * len(lists) // batch_size + g * (len(lists) // batch_size > 1)]
            older = own[: max(len(own) - num_recent, 0)]
            for i in range(qo_len):
                at = seen_len - qo_len + i
                columns = [*own, *range(KV_LEN, at + 1)]
                if mask is not None:
                    columns = [j for j in columns if mask[b, j]]
                logits = []
                for j in columns:
                    part = CHANNELS[b, g] if j in older else torch.arange(HEAD_DIM)
                    q, k = query[b, h, i, part].double(), keys[b, g, j, part].double()
                    logits.append(SM_SCALE * float(q @ k))
                if columns:
                    weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
                    output[b, i, h] = weights @ values[b, g, columns].double()
    return output


def test_worked_example() -> None:
    """Older keys (2, ., 4, .) and (0, ., 4, .), the newest (2, 1, 2, 0): logits 6, 4 and 5."""
    keys = torch.tensor([[2.0, 9.0, 4.0, 9.0], [0.0, 9.0, 4.0, 9.0], [2.0, 1.0, 2.0, 0.0]])
    tags = torch.tensor([[[[0, 0, 0], [1, 1, 0], [2, 2, 0]]]], dtype=torch.int32)
    block = Slots(
        keys[None, None],
        torch.eye(3)[None, None],
        tags,
        seen_len=3,
        padding_lens=torch.zeros(1, dtype=torch.int32),
        has_empty=False,
    )
    kept = torch.tensor([[[0, 1, 2]]], dtype=torch.int32)
    channels = torch.tensor([[[0, 2]]], dtype=torch.int32)
    selection = Selection(kept, torch.tensor([[3]], dtype=torch.int32))
    layer = pack_slots(block, selection, channels, num_recent=1)
    assert layer.older.slots.keys.tolist() == [[[[2, 4], [0, 4]]]]
    assert layer.slots.keys.tolist() == [[[[2, 1, 2, 0]]]]
    output = layer.attend(torch.ones(1, 1, 1, 4), None, partial(attend_with_lse, sm_scale=1.0))
    expected = torch.tensor([6.0, 4.0, 5.0]).softmax(0)
    torch.testing.assert_close(output[0, 0, 0], expected)


@pytest.mark.parametrize("num_recent", [0, NUM_RECENT, 100])
@pytest.mark.parametrize("lens_name", LENS)
def test_attention_equals_the_loops(lens_name: str, num_recent: int) -> None:
    """Over steps, a turn of several rows with padding, and later steps."""
    layer, lists, keys, values = make_layer(lens_name, num_recent)
    assert columns_of(layer) == lists
    for count, group_size in ((1, 2), (1, 1), (5, 2), (1, 2)):
        new_keys = torch.randn(BATCH_SIZE, NUM_KV_HEADS, count, HEAD_DIM)
        new_values = torch.randn(BATCH_SIZE, NUM_KV_HEADS, count, VALUE_DIM)
        layer.append(new_keys, new_values)
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        query = torch.randn(BATCH_SIZE, group_size * NUM_KV_HEADS, count, HEAD_DIM)
        mask = torch.ones(BATCH_SIZE, keys.shape[2], dtype=torch.bool)
        mask[1, 5:30] = False
        mask[2, KV_LEN + 2 : KV_LEN + 4] = False
        if count > 1:
            layer.note_turn(torch.ones(BATCH_SIZE, count), mask)
            for own, left in zip(per_sequence(lists), per_sequence(columns_of(layer)), strict=True):
                for b in range(BATCH_SIZE):
                    seen = [*own[b], *range(KV_LEN, keys.shape[2])]
                    assert left[b] == [j for j in seen if mask[b, j]]
        for given in (mask,) if keys.shape[2] > KV_LEN + 2 else (None, mask):
            actual = layer.attend(query, given, attend)
            expected = attend_by_loops(query, keys, values, lists, given, num_recent)
            assert actual.dtype == query.dtype
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_many_rows_at_once() -> None:
    """A turn that is longer than a block of rows."""
    layer, lists, keys, values = make_layer("buckets")
    count = ROW_BLOCK + 3
    new = torch.randn(BATCH_SIZE, NUM_KV_HEADS, count, HEAD_DIM + VALUE_DIM)
    new_keys, new_values = new.split([HEAD_DIM, VALUE_DIM], -1)
    layer.append(new_keys, new_values)
    query = torch.randn(BATCH_SIZE, NUM_KV_HEADS, count, HEAD_DIM)
    actual = layer.attend(query, None, attend)[:, -5:]
    keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
    expected = attend_by_loops(query[:, :, -5:], keys, values, lists, None)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_is_zero() -> None:
    layer, *_ = make_layer("shared")
    new = torch.randn(BATCH_SIZE, NUM_KV_HEADS, 1, HEAD_DIM)
    layer.append(new, new[..., :VALUE_DIM])
    mask = torch.zeros(BATCH_SIZE, KV_LEN + 1, dtype=torch.bool)
    mask[1] = True
    output = layer.attend(new, mask, attend)
    assert (output[[0, 2]] == 0).all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("lens_name", LENS)
def test_the_batch_follows(lens_name: str) -> None:
    """After `take` and `crop`, as if there had never been anything else."""
    layer, lists, *_ = make_layer(lens_name)
    new = torch.randn(BATCH_SIZE, NUM_KV_HEADS, 3, HEAD_DIM)
    layer.append(new, new[..., :VALUE_DIM])
    index, num_lists = [2, 0, 2, 1], layer.num_lists
    taken = copy.deepcopy(layer)
    taken.take(torch.tensor(index))
    assert taken.batch_size == 4
    assert torch.equal(taken.channels, layer.channels[index])
    query = torch.randn(BATCH_SIZE, 2 * NUM_KV_HEADS, 1, HEAD_DIM)
    expected = layer.attend(query, None, attend)
    torch.testing.assert_close(taken.attend(query[index], None, attend), expected[index])
    layer.crop(2)
    layer.take(torch.tensor([1, 0, 2]))
    after = [lists[b * num_lists + h] + [KV_LEN] for b in (1, 0, 2) for h in range(num_lists)]
    assert columns_of(layer) == after
    with pytest.raises(ValueError, match="only the 1 tokens that came after the eviction"):
        layer.crop(2)


@pytest.mark.parametrize("lens_name", ["equal", "shared"])
def test_bytes(lens_name: str) -> None:
    """Older keys take 3 of 8 channels; they are never copied when tokens are appended."""
    layer, _, keys, _ = make_layer(lens_name)
    heads, longest = BATCH_SIZE * NUM_KV_HEADS, 20
    rows = heads * (longest - NUM_RECENT)
    expected = 4 * rows * (3 + VALUE_DIM) + 4 * heads * NUM_RECENT * (HEAD_DIM + VALUE_DIM)
    assert layer.num_bytes == expected
    assert layer.num_bookkeeping_bytes > 4 * CHANNELS.numel()
    old = layer.older.slots.keys.data_ptr()
    moves = set()
    for _ in range(300):
        layer.append(keys[:, :, :1], keys[:, :, :1, :VALUE_DIM])
        moves.add(layer.slots.keys.data_ptr())
    assert layer.older.slots.keys.data_ptr() == old
    assert layer.older.num_bytes == 4 * rows * (3 + VALUE_DIM)
    assert len(moves) < 12
    stored = NUM_RECENT + 300
    assert layer.slots.num_bytes <= 4 * heads * 12 * stored * (1 + 1 / SLACK_SHARE) + 12 * 32 * 4


def test_lists_are_split_by_age() -> None:
    kept = torch.tensor([[[1, 4, 6, 8, 9]], [[2, 3, -1, -1, -1]]], dtype=torch.int32)
    selection = Selection(kept, torch.tensor([[5], [2]], dtype=torch.int32), ragged=True)
    older, newer = split_recent(selection, 3)
    assert older.kept_indices.tolist() == [[[1, 4]], [[-1, -1]]]
    assert older.kept_lens.tolist() == [[2], [0]]
    assert newer.kept_indices.tolist() == [[[6, 8, 9]], [[2, 3, -1]]]
    assert newer.kept_lens.tolist() == [[3], [2]]
    assert older.kept_indices.dtype == newer.kept_lens.dtype == torch.int32


def test_it_is_not_one_block() -> None:
    layer, *_ = make_layer("equal")
    assert not layer.is_one_block
    assert layer.older.is_one_block
    with pytest.raises(ValueError, match="keys lack channels cannot be evicted again"):
        layer.unite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: Any) -> None:
    query = torch.randn(2, 4, 3, HEAD_DIM).to(dtype)
    key, value = torch.randn(2, 2, 2, 20, HEAD_DIM).to(dtype).unbind(0)
    actual = attend(query, key, value, None)
    expected = attend(query.float(), key.float(), value.float(), None)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.03)
