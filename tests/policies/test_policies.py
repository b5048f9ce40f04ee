"""Policies on tensors: worked examples, budget formulas, forced sets, the oracle composition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvevict
from kvevict import policies, reference
from kvevict.ops.enums import HeadReduction
from kvevict.policies import TGVKV, LayerScores, Policy, PrefillPolicy, Prompt, SnapKV
from kvevict.policies.snapkv import pool_scores


def make_prompt(*rows: str) -> Prompt:
    """Return a prompt from one letter per key: t text, i image, v video, a audio, . padding."""
    codes = {"t": 0, "i": 1, "v": 2, "a": 3, ".": 0}
    modality = torch.tensor([[codes[c] for c in row] for row in rows], dtype=torch.int8)
    key_mask = torch.tensor([[c != "." for c in row] for row in rows])
    return Prompt(modality, None if key_mask.all() else key_mask)


def make_layers(prompt: Prompt, num_layers: int = 3, qo_len: int | None = None) -> dict[str, Any]:
    """Return random queries, keys and values of GQA layers (4 query heads, 2 KV heads)."""
    batch_size, kv_len = prompt.modality.shape
    qo_len = kv_len if qo_len is None else qo_len
    return {
        "queries": [3 * torch.randn(batch_size, 4, qo_len, 8) for _ in range(num_layers)],
        "keys": [torch.randn(batch_size, 2, kv_len, 8) for _ in range(num_layers)],
        "values": [torch.randn(batch_size, 2, kv_len, 8) for _ in range(num_layers)],
    }


def observe_all(policy: PrefillPolicy, prompt: Prompt, layers: dict[str, Any]) -> list[LayerScores]:
    """Return the scores of all layers."""
    prompt = replace(prompt, qo_len=layers["queries"][0].shape[2])
    tensors = zip(layers["queries"], layers["keys"], layers["values"], strict=True)
    return [policy.observe(q, k, v, prompt, policy.row_index(prompt)) for q, k, v in tensors]


def kept_lists(selection: policies.Selection) -> list[list[list[int]]]:
    """Return the kept indices without their padding."""
    return [
        [row[:count].tolist() for row, count in zip(rows, counts.tolist(), strict=True)]
        for rows, counts in zip(selection.kept_indices, selection.kept_lens, strict=True)
    ]


# The worked example of TGV-KV


def example_layers() -> tuple[list[Tensor], list[Tensor]]:
    """Return queries and keys whose attention is that of the example: logits = log A."""
    tables = [
        [
            [0.10, 0.20, 0.05, 0.10, 0.15, 0.40, 0.00, 0.00],
            [0.10, 0.10, 0.10, 0.20, 0.05, 0.25, 0.20, 0.00],
            [0.05, 0.05, 0.30, 0.10, 0.05, 0.10, 0.15, 0.20],
        ],
        [
            [0.50, 0.10, 0.10, 0.05, 0.05, 0.20, 0.00, 0.00],
            [0.15, 0.10, 0.05, 0.10, 0.10, 0.10, 0.40, 0.00],
            [0.25, 0.10, 0.05, 0.05, 0.10, 0.05, 0.30, 0.10],
        ],
    ]
    queries = []
    for table in tables:
        attention = torch.eye(8)
        for i in range(5):
            attention[i] = (torch.arange(8) <= i) / (i + 1)
        attention[5:] = torch.tensor(table)
        queries.append(attention.clamp(min=1e-30).log()[None, None])
    return queries, [torch.eye(8)[None, None] for _ in tables]


@pytest.mark.parametrize("text_score", ["paper", "released"])
def test_tgv_worked_example(text_score: Any) -> None:
    queries, keys = example_layers()
    prompt = make_prompt("tiiiittt")
    policy = TGVKV(keep=0.5, num_sink=1, num_recent=1, text_score=text_score)
    layers = [
        policy.observe(q, k, k, prompt, policy.row_index(prompt), sm_scale=1.0)
        for q, k in zip(queries, keys, strict=True)
    ]
    masses = [float(layer.mass) for layer in layers if layer.mass is not None]
    assert masses == pytest.approx([1.45, 0.95], abs=1e-5)
    assert layers[0].scores[0, 0, 1:5].tolist() == pytest.approx(
        [0.0775, 0.09, 0.08, 0.05625], abs=1e-5
    )
    assert layers[1].scores[0, 0, 1:5].tolist() == pytest.approx(
        [0.05667, 0.03417, 0.04583, 0.05083], abs=1e-5
    )
    assert policy.budgets(layers).tolist() == [[5], [3]]
    new_keys, _, selections = policies.evict_prompt(
        policy, queries, keys, [k.clone() for k in keys], prompt, sm_scale=1.0
    )
    assert selections is not None
    assert [kept_lists(s) for s in selections] == [[[[0, 2, 5, 6, 7]]], [[[0, 6, 7]]]]
    assert torch.equal(new_keys[1][0, 0], torch.eye(8)[[0, 6, 7]])


def test_tgv_clipped_shares_and_water_filling() -> None:
    """The shares of methods that lose budget by clipping: 3600 of 4000 slots are kept."""
    shares = [0.02, 0.03, 0.05, 0.10, 0.35, 0.25, 0.12, 0.08]
    prompt = make_prompt("t" * 10 + "i" * 900 + "t" * 90)
    layers = [LayerScores(torch.zeros(1, 1, 1000), prompt, torch.tensor([s * 40])) for s in shares]
    lost = TGVKV(keep=0.5).budgets(layers)[:, 0]
    assert lost.tolist() == [80, 120, 200, 400, 1000, 1000, 480, 320]
    filled = TGVKV(keep=0.5, redistribute=True).budgets(layers)[:, 0]
    assert abs(int(filled.sum()) - 4000) <= 4
    assert filled.max() == 1000
    assert (filled >= lost).all()
    # 400 + 200 freed slots go to the six others in proportion to their shares .02 ... .12, .08.
    assert filled.tolist() == [100, 150, 250, 500, 1000, 1000, 600, 400]


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


@pytest.mark.parametrize("policy", [TGVKV, SnapKV])
@pytest.mark.parametrize("keep", [1.0, 1.5, 20, 1000])
def test_keeping_all_moves_nothing(policy: Any, keep: float | int) -> None:
    prompt = make_prompt("tttiiiiiiiiiittttttt", "....ttiiiiiiiiittttt")
    layers = make_layers(prompt)
    keys, values, selections = policies.evict_prompt(policy(keep=keep), prompt=prompt, **layers)
    assert selections is None
    assert all(a is b for a, b in zip(keys, layers["keys"], strict=True))
    assert all(a is b for a, b in zip(values, layers["values"], strict=True))


# Forced sets and order

PROMPTS = {
    "one_image": ["tttttiiiiiiiiiiiiiittttttt"],
    "two_images": ["tttiiiiiitttiiiiiiiiiitttt"],
    "video_with_separators": ["ttvvvvvtvvvvvtvvvvvvtttttt"],
    "image_first": ["iiiiiiiiiiiiiiiiiiiitttttt"],
    "left_padded": [
        "......tttiiiiiiiiiiittttt",
        "ttttiiiiiiittiiiiiiiiittt",
        "..tiiiiiiiiiiiiiiiiiiiiit",
    ],
    "mixed": ["tttttttttttttttttttttttt", "ttttttttiiiiiiiiiiiiiiii", "..ttttiiiiiiiiiiiitttttt"],
    "audio": ["ttaaaaaiiiiiiiiiiiitaatt"],
}
POLICIES: dict[str, PrefillPolicy] = {
    "tgv": TGVKV(keep=0.4),
    "tgv_released": TGVKV(keep=0.4, text_score="released"),
    "tgv_tokens": TGVKV(keep=8, num_sink=2, num_recent=2, redistribute=True),
    "snapkv": SnapKV(keep=0.4, window=4),
    "snapkv_tokens": SnapKV(keep=11, num_sink=1, window=32, pool_kernel=1),
}


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_batch_is_a_loop_over_its_sequences(policy_name: str, prompt_name: str) -> None:
    """And every list is ascending, without padding, with its forced tokens."""
    policy = POLICIES[policy_name]
    assert isinstance(policy, Policy)
    prompt = make_prompt(*PROMPTS[prompt_name])
    layers = make_layers(prompt)
    keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    for b, row in enumerate(PROMPTS[prompt_name]):
        padding = row.count(".")
        alone = {
            name: [t[b : b + 1, :, padding:] for t in tensors] for name, tensors in layers.items()
        }
        one = make_prompt(row[padding:])
        _, _, single = policies.evict_prompt(policy, prompt=one, **alone)
        for i, selection in enumerate(selections):
            lists = kept_lists(selection)[b]
            if single is None:
                expected = [list(range(len(row) - padding))] * len(lists)
            else:
                expected = kept_lists(single[i])[0]
            assert [[j - padding for j in kept] for kept in lists] == expected
            for head, kept in enumerate(lists):
                assert kept == sorted(set(kept))
                forced = min(policy.num_sink, len(kept) // 2)
                assert kept[:forced] == list(range(padding, padding + forced))
                assert kept[-1] == len(row) - 1
                for h in [head] if len(lists) > 1 else [0, 1]:
                    count = len(kept)
                    assert torch.equal(keys[i][b, h, :count], layers["keys"][i][b, h, kept])
                    assert torch.equal(values[i][b, h, :count], layers["values"][i][b, h, kept])
                    assert (keys[i][b, h, count:] == 0).all()


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


# Against the oracles


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("text_score", ["paper", "released"])
def test_tgv_equals_the_oracle_composition(prompt_name: str, text_score: Any) -> None:
    prompt = make_prompt(*PROMPTS[prompt_name])
    layers = make_layers(prompt)
    policy = TGVKV(keep=0.4, text_score=text_score)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    for b, row in enumerate(PROMPTS[prompt_name]):
        expected = tgv_oracle(row, b, layers, 0.4, text_score)
        assert [kept_lists(s)[b][0] for s in selections] == expected


def tgv_oracle(
    row: str, b: int, layers: dict[str, Any], keep: float, text_score: str
) -> list[list[int]]:
    """Choose with the float64 oracles, one sequence at a time."""
    real = [j for j, c in enumerate(row) if c != "."]
    vision = [j for j in real if row[j] in "iv"]
    if not vision:
        return [real] * len(layers["keys"])
    rows = [j for j in real if j > vision[-1] and row[j] == "t"]
    key_mask = torch.tensor([[c != "." for c in row]])
    ranked, masses = [], []
    for query, key in zip(layers["queries"], layers["keys"], strict=True):
        q, k = query[b : b + 1], key[b : b + 1]
        index = torch.tensor([rows or real], dtype=torch.int32)
        weighted, sums, _ = reference.score_keys_by_text(q, k, index, key_mask=key_mask)
        text = sums
        if text_score == "released":
            text = reference.score_keys(
                q, k, key_mask=key_mask, head_reduction=HeadReduction.ALL_MEAN
            )
        seen = weighted if rows else sums
        ranked.append({j: float((seen if j in vision else text)[0, 0, j]) for j in real})
        masses.append(float(sums[0, 0, vision].sum()) if rows else 1.0)
    result = []
    for scores, mass in zip(ranked, masses, strict=True):
        drop = max(0, round(len(real) * (1 - len(masses) * keep * mass / sum(masses))))
        middle = sorted(real[4:-1], key=lambda j: (j in vision, -scores[j], j))
        best = middle[: max(0, len(middle) - drop)]
        result.append(sorted([*real[:4], *best, real[-1]]))
    return result


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("pool_kernel", [1, 3, 5])
def test_snapkv_equals_the_oracle_composition(prompt_name: str, pool_kernel: int) -> None:
    prompt = make_prompt(*PROMPTS[prompt_name])
    layers = make_layers(prompt, num_layers=1)
    policy = SnapKV(keep=0.5, window=4, num_sink=2, pool_kernel=pool_kernel)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    for b, row in enumerate(PROMPTS[prompt_name]):
        real = [j for j, c in enumerate(row) if c != "."]
        budget = math.floor(0.5 * len(real) + 1e-9)
        scores = reference.score_keys(
            layers["queries"][0][b : b + 1],
            layers["keys"][0][b : b + 1],
            row_index=torch.tensor([real[-4:]], dtype=torch.int32),
            key_mask=torch.tensor([[c != "." for c in row]]),
        )
        open_keys = real[2:-4]
        for h, kept in enumerate(kept_lists(selections[0])[b]):
            half = pool_kernel // 2
            pooled = {
                j: sum(float(scores[0, h, i]) for i in open_keys if abs(i - j) <= half)
                for j in open_keys
            }
            best = sorted(open_keys, key=lambda j: (-pooled[j], j))[: budget - 6]
            assert kept == sorted([*real[:2], *best, *real[-4:]])


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


def test_registry() -> None:
    assert policies.list() == ["snapkv", "tgv_kv"]
    assert policies.get("snapkv", keep=64, window=16) == SnapKV(keep=64, window=16)
    assert policies.get("tgv_kv", keep=0.05) == TGVKV(keep=0.05)
    assert all(isinstance(policies.get(n, keep=0.1), PrefillPolicy) for n in policies.list())
    with pytest.raises(ValueError, match=r"name must be one of \['snapkv', 'tgv_kv'\], got 'x'"):
        policies.get("x")


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
    ],
)
def test_refused_fields(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_empty_batch_and_empty_prompt() -> None:
    for shape in ((0, 5), (2, 0)):
        prompt = Prompt(torch.zeros(shape, dtype=torch.int8))
        for policy in POLICIES.values():
            assert policies.evict_prompt(policy, prompt=prompt, **make_layers(prompt))[2] is None
