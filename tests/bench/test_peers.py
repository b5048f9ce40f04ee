"""The peers compute what they claim: against the float64 oracles, on small shapes."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from bench.checks import check_close, check_rounded, check_same_choice
from bench.shapes import A8, CacheInputs, Workload, attention_inputs, cache_inputs
from kvevict import reference

SMALL = Workload("small", 4, 2, 2, 8, 2, 50, 7, 16)


def test_scores() -> None:
    x = attention_inputs(SMALL, torch.float32)
    expected = reference.score_keys(x.query, x.key)
    lse = reference.attention_lse(x.query, x.key).float()
    scores = {
        "eager": peers.snapkv_scores(x.query, x.key),
        "best torch": peers.grouped_scores(x.query, x.key),
        "LSE given": peers.scores_given_lse(x.query, x.key, lse),
    }
    for name, result in scores.items():
        check_close(name, result, expected, torch.float32)
    check_close("LSE", peers.attention_lse(x.query, x.key), lse, torch.float32)


def test_accumulated_scores() -> None:
    x = attention_inputs(SMALL, torch.float32)
    scores = torch.rand(2, 2, SMALL.kv_len)
    expected = scores.double()
    reference.accumulate_scores_(expected, x.query, x.key, decay=0.9)
    for peer in (peers.accumulated_scores, peers.accumulated_grouped_scores):
        check_close(peer.__name__, peer(scores, x.query, x.key, 0.9), expected, torch.float32)


def test_scores_by_text() -> None:
    x = attention_inputs(SMALL, torch.float32)
    rows = torch.arange(SMALL.num_rows, dtype=torch.int32).expand(SMALL.batch_size, -1)
    expected = reference.score_keys_by_text(x.query, x.key, rows)
    for part, wanted in zip(peers.tgv_scores(x.query, x.key), expected, strict=True):
        check_close("eager", part, wanted, torch.float32)


def test_diversity() -> None:
    key = attention_inputs(SMALL, torch.float32).key + 1
    similarity, redundancy = reference.key_diversity(key)
    actual = peers.key_diversity(key)
    check_close("eager", actual[0], similarity, torch.float32)
    check_close("eager", actual[1], redundancy, torch.float32)
    inputs = (torch.rand_like(actual[0]), *torch.rand(2, *actual[0].shape), actual[1])
    check_close("eager", peers.mix_scores(*inputs), reference.mix_scores(*inputs), torch.float32)


def test_moves() -> None:
    x = cache_inputs(SMALL, 20, torch.bfloat16)
    keys, values = reference.gather_kv(x.keys, x.values, x.kept_indices)
    for moved in (peers.gather_cache(x), peers.index_select_cache(x)):
        for mine, wanted in zip(moved, [*keys, *values], strict=True):
            assert torch.equal(mine, wanted)


def test_cache_inputs_are_ascending_lists() -> None:
    x: CacheInputs = cache_inputs(SMALL, 20, torch.float32)
    assert x.kept_indices.shape == (2, 2, 2, 10)
    assert (x.kept_indices.diff() > 0).all()


def test_selection_is_ascending() -> None:
    index = peers.topk_sorted(torch.rand(2, 3, 40), 10)
    assert (index.diff() > 0).all()


@pytest.mark.parametrize("heads", [(2,), (3, 2, 2)])
def test_rotation(heads: tuple[int, ...]) -> None:
    keys = [torch.randn(2, 2, 50, 16) for _ in range(3)]
    old_positions = torch.randint(0, 90, (*heads, 50), dtype=torch.int32)
    new_positions, inv_freq = torch.arange(50, dtype=torch.int32).expand(2, -1), torch.rand(8)
    expected = [key.double() for key in keys]
    reference.rerotate_keys_(expected, old_positions, new_positions, inv_freq)
    rotated = peers.rerotate(keys, old_positions, new_positions, inv_freq)
    for mine, wanted in zip(rotated, expected, strict=True):
        check_rounded("eager", mine, wanted)


@pytest.mark.parametrize("pool_kernel", [1, 5])
def test_whole_step(pool_kernel: int) -> None:
    x = attention_inputs(SMALL, torch.float32, with_value=True)
    priority = torch.ones(SMALL.batch_size, SMALL.kv_len, dtype=torch.uint8)
    priority[:, -SMALL.num_rows :] = 2
    kept, _, _ = reference.score_and_compact(
        x.query, x.key.clone(), x.value.clone(), 20, priority=priority, pool_kernel=pool_kernel
    )
    key, value, index = peers.snapkv_press(*x, 20, pool_kernel)
    check_same_choice("eager", index, kept, SMALL.kv_len, 1.0)
    assert torch.equal(key, peers.gather_rows(x.key, index))
    assert torch.equal(value, peers.gather_rows(x.value, index))
    scores = peers.window_scores(x.query, x.key, pool_kernel)
    check_same_choice("best", peers.topk_sorted(scores, 20), kept, SMALL.kv_len, 1.0)


def test_visible_pairs_are_counted() -> None:
    visible = torch.ones(SMALL.num_rows, SMALL.kv_len).tril(SMALL.kv_len - SMALL.num_rows)
    assert SMALL.logits == SMALL.batch_size * SMALL.num_qo_heads * int(visible.sum())
    assert A8.key_bytes(torch.bfloat16) == 8 * 2980 * 128 * 2
