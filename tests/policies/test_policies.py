"""TGV-KV and SnapKV on tensors: budget formulas, order, forced sets; fields that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvevict
from kvevict import policies, reference
from kvevict.ops.enums import HeadReduction
from kvevict.policies import TGVKV, LayerScores, MixKV, SnapKV, get
from kvevict.policies.snapkv import pool_scores
from tests.policies.cases import PROMPTS, kept_lists, make_layers, make_prompt, observe_all

# Budgets


@settings(max_examples=60)
@given(
    masses=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    length=st.integers(1, 80),
    vision=st.integers(1, 80),
    keep=st.one_of(st.floats(0.01, 1.2), st.integers(1, 100)),
    num_sink=st.integers(0, 6),
)
def test_tgv_budgets_equal_the_formula(
    masses: list[float], length: int, vision: int, keep: float, num_sink: int
) -> None:
    vision = min(vision, length)
    row = "t" * ((length - vision) // 2) + "i" * vision
    prompt = make_prompt(row + "t" * (length - len(row)))
    layers = [
        LayerScores(torch.zeros(1, 1, length), prompt, torch.tensor([m], dtype=torch.float32))
        for m in masses
    ]
    actual = TGVKV(keep=keep, num_sink=num_sink).budgets(layers)[:, 0].tolist()
    assert actual == [tgv_budget(own, layers, length, keep, num_sink) for own in range(len(layers))]


def tgv_budget(
    own: int, layers: Sequence[LayerScores], length: int, keep: float, num_sink: int
) -> int:
    """Return the tokens of one layer, in plain Python."""
    ratio = min(keep / length if isinstance(keep, int) else keep, 1.0)
    if length - length * ratio < 1 - 1e-9:
        return length
    masses = [float(layer.mass) for layer in layers if layer.mass is not None]
    share = masses[own] / sum(masses) if sum(masses) > 0 else 1 / len(masses)
    drop = max(0, round(length * (1 - len(masses) * ratio * share)))
    forced = min(length, num_sink + 1)
    return forced + max(0, length - forced - drop)


def test_rounding_is_half_to_even() -> None:
    prompt = make_prompt("tttttiiiii")
    even = [LayerScores(torch.zeros(1, 1, 10), prompt, torch.ones(1)) for _ in range(2)]
    # 10 * (1 - .25) = 7.5 drops 8; 10 * (1 - .35) = 6.5 drops 6.
    policy = TGVKV(keep=0.25, num_sink=0, num_recent=0)
    assert policy.budgets(even).tolist() == [[2], [2]]
    assert replace(policy, keep=0.35).budgets(even).tolist() == [[4], [4]]


@pytest.mark.parametrize(
    ("keep", "length", "expected"),
    [(0.29, 100, 29), (0.05, 600, 30), (0.001, 10, 1), (7, 100, 7), (7, 5, 5), (1.0, 9, 9)],
)
def test_snapkv_budget_counts_everything(keep: float, length: int, expected: int) -> None:
    prompt = make_prompt("t" * length)
    layer = LayerScores(torch.zeros(1, 2, length), prompt)
    assert SnapKV(keep=keep).budgets([layer]).tolist() == [[expected]]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.8])
def test_tgv_text_goes_first(keep: float) -> None:
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    policy = TGVKV(keep=keep, num_sink=0, num_recent=0)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    for selection in selections:
        for b, (kept,) in enumerate(kept_lists(selection)):
            vision = prompt.is_vision[b]
            num_text = int((prompt.valid[b] & ~vision).sum())
            kept_text = sum(not vision[j] for j in kept)
            assert kept_text == min(num_text, len(kept))


def test_tgv_leaves_a_text_only_sequence_whole() -> None:
    prompt = make_prompt("tttttttttttttttt", "ttiiiiiiiiiitttt")
    _, _, selections = policies.evict_prompt(TGVKV(keep=0.3), prompt=prompt, **make_layers(prompt))
    assert selections is not None
    for selection in selections:
        assert kept_lists(selection)[0] == [list(range(16))]
        assert len(kept_lists(selection)[1][0]) < 16
    only_text = make_prompt("tttttttttttttttt")
    layers = make_layers(only_text)
    assert policies.evict_prompt(TGVKV(keep=0.3), prompt=only_text, **layers)[2] is None


def test_tgv_without_trailing_text_shares_evenly() -> None:
    """All rows vote, with equal weight."""
    prompt = make_prompt("tttttiiiiiiiiiiiiiii")
    layers = make_layers(prompt)
    policy = TGVKV(keep=0.5)
    scores = observe_all(policy, prompt, layers)
    for layer, query, key in zip(scores, layers["queries"], layers["keys"], strict=True):
        expected = reference.score_keys(query, key, head_reduction=HeadReduction.ALL_MEAN)
        torch.testing.assert_close(layer.scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert policy.budgets(scores).tolist() == [[10], [10], [10]]


def test_a_query_of_new_rows_only() -> None:
    """A later turn: its rows are the last ones of a longer, partly empty list of keys."""
    prompt = replace(make_prompt("ttiiiiii..tttttt"), qo_len=6, total_lens=torch.tensor([30]))
    layers = make_layers(prompt, qo_len=6)
    assert TGVKV(keep=0.4).row_index(prompt).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert SnapKV(keep=0.4, window=4).row_index(prompt).tolist() == [[2, 3, 4, 5]]
    _, _, selections = policies.evict_prompt(SnapKV(keep=0.3), prompt=prompt, **layers)
    assert selections is not None
    assert selections[0].kept_lens.tolist() == [[9, 9]]
    _, _, selections = policies.evict_prompt(TGVKV(keep=0.3), prompt=prompt, **layers)
    assert selections is not None
    assert sum(int(s.kept_lens) for s in selections) in (26, 27, 28)


# SnapKV


def test_priority_of_padded_sequences() -> None:
    key_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()
    preferred = torch.tensor([[1, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1, 0]]).bool()
    priority = kvevict.build_priority(key_mask, num_sink=1, num_recent=2, preferred=preferred)
    assert priority.tolist() == [[0, 0, 3, 2, 2, 3, 3], [3, 2, 3, 3, 0, 0, 0]]


def test_priority_with_counts_per_sequence() -> None:
    key_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1] * 7]).bool()
    sinks, recents = [0, 1, 3], [2, 9, 0]
    actual = kvevict.build_priority(
        key_mask, num_sink=torch.tensor(sinks), num_recent=torch.tensor(recents)
    )
    for b, (num_sink, num_recent) in enumerate(zip(sinks, recents, strict=True)):
        expected = kvevict.build_priority(
            key_mask[b : b + 1], num_sink=num_sink, num_recent=num_recent
        )
        assert torch.equal(actual[b : b + 1], expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_sink": -1}, "num_sink must be at least 0, got -1"),
        ({"num_recent": torch.ones(3)}, r"num_recent must have shape \(2,\), got \(3,\)"),
        ({"num_sink": torch.ones(2, 1)}, r"num_sink must have shape \(2,\), got \(2, 1\)"),
        ({"preferred": torch.ones(7)}, r"preferred must have shape \(2, 7\), got \(7,\)"),
        ({"key_mask": torch.ones(2, 7)}, "key_mask must be bool of rank 2, got torch.float32"),
    ],
)
def test_priority_refusals(options: dict[str, Any], words: str) -> None:
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"kvevict.build_priority: {words}"):
        kvevict.build_priority(**{"key_mask": key_mask, **options})


def test_snapkv_equals_the_fused_op() -> None:
    prompt = make_prompt("t" * 70)
    layers = make_layers(prompt, num_layers=1)
    query, key, value = layers["queries"][0], layers["keys"][0], layers["values"][0]
    policy = SnapKV(keep=20, window=8)
    keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    kept_indices, kept_lens, scores = kvevict.score_and_compact(
        query,
        key,
        value,
        20,
        row_index=policy.row_index(prompt),
        priority=policy.priority(prompt, torch.tensor([20])),
        pool_kernel=5,
    )
    assert torch.equal(selections[0].kept_indices, kept_indices)
    assert torch.equal(selections[0].kept_lens, kept_lens)
    assert scores.shape == (1, 2, 70)
    assert torch.equal(keys[0], key[:, :, :20])
    assert torch.equal(values[0], value[:, :, :20])


def test_pool_counts_other_classes_as_zero() -> None:
    scores = torch.tensor([[[9.0, 1.0, 2.0, 3.0, 7.0]]])
    priority = torch.tensor([[2, 1, 1, 1, 2]], dtype=torch.uint8)
    pooled = pool_scores(scores, priority, 3)
    assert pooled[0, 0].tolist() == pytest.approx([9, 1.0, 2.0, 5 / 3, 7])


@pytest.mark.parametrize("budget", [1, 2, 3, 6, 12, 16, 64])
def test_snapkv_small_budgets_leave_something_to_choose(budget: int) -> None:
    prompt = make_prompt("t" * 80)
    policy = SnapKV(keep=budget, num_sink=4, window=8)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **make_layers(prompt))
    assert selections is not None
    for kept in kept_lists(selections[0])[0]:
        assert len(kept) == budget
        recent = min(8, (budget + 1) // 2)
        assert kept[-recent:] == list(range(80 - recent, 80))
        sinks = min(4, budget - recent)
        assert kept[:sinks] == list(range(sinks))


# Sinks


def test_a_forced_sink_survives_a_window_that_ignores_it() -> None:
    """Without it a window score drops the first token, in every head."""
    prompt = make_prompt("t" * 60)
    layers = make_layers(prompt)
    for query, key in zip(layers["queries"], layers["keys"], strict=True):
        query += 3
        key[:, :, 0] = -2
    for num_sink, present in ((0, False), (1, True)):
        policy = SnapKV(keep=20, window=8, num_sink=num_sink, pool_kernel=1)
        _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
        assert selections is not None
        firsts = [kept[0] == 0 for s in selections for kept in kept_lists(s)[0]]
        assert all(firsts) if present else not any(firsts)


# Construction


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TGVKV(keep=0), "TGVKV: keep must be a positive ratio"),
        (lambda: TGVKV(keep=-0.5), "keep must be a positive ratio"),
        (lambda: SnapKV(keep=True), "keep must be a positive ratio"),
        (lambda: SnapKV(keep=float("nan")), "keep must be a positive ratio"),
        (lambda: TGVKV(keep=0.1, num_sink=-1), "num_sink must be an int of at least 0, got -1"),
        (lambda: SnapKV(keep=0.1, window=0), "window must be an int of at least 1, got 0"),
        (lambda: SnapKV(keep=0.1, pool_kernel=4), "pool_kernel must be odd, got 4"),
        (lambda: TGVKV(keep=0.1, text_score="x"), "text_score must be 'paper' or 'released'"),  # type: ignore[arg-type]
        (lambda: TGVKV(keep=0.1, num_recent=-1), "num_recent must be an int of at least 0"),
        (lambda: TGVKV(keep=None), "keep must be a positive ratio"),
        (lambda: get("adakv", keep=0.1, floor=1.5), r"AdaKV: floor must be in \[0, 1\], got 1.5"),
        (lambda: get("adakv", keep=0.1, floor_rule="x"), "must be 'kvpress' or 'original'"),
        (lambda: get("chunkkv", keep=0.1, chunk_len=0), "chunk_len must be an int of at least 1"),
        (lambda: get("chunkkv", keep=0.1, num_reuse=0), "num_reuse must be an int of at least 1"),
        (lambda: get("corm", keep=0), "CORM: keep must be a positive ratio"),
        (lambda: get("corm", window=0), "window must be an int of at least 1"),
        (lambda: get("corm", num_recent=-1), "num_recent must be an int of at least 0"),
        (lambda: get("d2o", keep=0.1, recent_share=2), "recent_share must be in"),
        (lambda: get("d2o", keep=0.1, merging="mean"), "'released' or 'exponential'"),
        (lambda: get("dbudgetkv", num_full=-1), "num_full must be an int of at least 0"),
        (lambda: get("dbudgetkv", num_recent=-1), "num_recent must be an int of at least 0"),
        (lambda: get("dbudgetkv", tolerance=2), r"tolerance must be in \[0, 1\]"),
        (lambda: get("flashcache", keep=0.1, cutoff=-0.1), r"cutoff must be in \[0, 1\]"),
        (lambda: get("h2o", keep=0.1, recent_share=True), "recent_share must be in"),
        (lambda: get("keepkv", keep=0.1, window=0), "window must be an int of at least 1"),
        (lambda: get("keepkv", keep=0.1, decay=1.1), r"decay must be in \[0, 1\]"),
        (lambda: get("keepkv", keep=0.1, similarity=2), r"similarity must be in \[-1, 1\]"),
        (lambda: get("lightkv_cache", keep=0.1, windows=(2, 0)), "windows must be ints of at"),
        (lambda: get("look_m", keep=0.1, recent_share=2), "recent_share must be in"),
        (lambda: get("look_m", keep=0.1, merging="sum"), "'pivot' or 'average' or 'weighted'"),
        (lambda: get("mixkv", host="h2o", keep=0.1), "host of mixkv must be one of"),
        (lambda: get("mixkv", keep=0.1, window=0), "SnapKV: window must be an int"),
        (lambda: MixKV(get("chunkkv", keep=0.1)), "MixKV: host must be SnapKV, PyramidKV or AdaKV"),  # type: ignore[arg-type]
        (lambda: MixKV(get("tova", keep=0.1)), "MixKV: host must be SnapKV, PyramidKV or AdaKV"),  # type: ignore[arg-type]
        (lambda: get("prefixkv", keep=0.1, num_recent=0.5), "num_recent must be an int"),
        (lambda: get("pyramidkv", keep=0.1, beta=0), "beta must be an int of at least 1"),
        (lambda: get("pyramidkv", keep=0.1, accounting="x"), "'original' or 'kvpress'"),
        (lambda: get("random", keep=0.1, seed=-1), "seed must be an int of at least 0"),
        (lambda: get("vl_cache", keep=0.1, threshold=1.1), "threshold must be in"),
        (lambda: get("vl_cache", keep=0.1, recent_share=-1), "recent_share must be in"),
        (lambda: get("zsmerge", keep=0.1, num_residual=0), "num_residual must be an int of at"),
        (lambda: get("zsmerge", keep=0.1, tail_share=2), "tail_share must be in"),
        (lambda: get("zsmerge", keep=0.1, decay=-1), "decay must be in"),
    ],
)
def test_refused_fields(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
