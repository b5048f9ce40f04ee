"""Policies on examples worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict import policies
from kvevict.policies import (
    CORM,
    TGVKV,
    AdaKV,
    ChunkKV,
    DBudgetKV,
    Grounded,
    LayerScores,
    PrefixKV,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
    VLCache,
)
from tests.policies.cases import kept_lists, make_layers, make_prompt

# TGV-KV


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


# SnapKV and what builds on it


def window_example() -> dict[str, Any]:
    """Return eight tokens, two query heads on one KV head, a window of the last two."""
    query = torch.zeros(1, 2, 8, 8)
    query[0, :, 6:, :2] = torch.tensor([[[1.0, 2], [2, 0]], [[0, 1], [1, 1]]])
    key = torch.zeros(1, 1, 8, 8)
    units = [(3, 4), (4, 3), (3, 4), (0, 5), (4, -3), (5, 0), (3, 4), (4, 3)]
    key[0, 0, :, :2] = torch.tensor(units) / 5
    value = torch.zeros(1, 1, 8, 8)
    lengths = [(1, 0), (2, 0), (0, 3), (1, 0), (0, 2), (4, 0), (1, 1), (1, 1)]
    value[0, 0, :, :2] = torch.tensor(lengths)
    return {"queries": [query], "keys": [key], "values": [value], "sm_scale": 2**-0.5}


def test_snapkv() -> None:
    policy = SnapKV(keep=5, num_sink=0, window=2, pool_kernel=3)
    prompt = make_prompt("tttttttt")
    example = window_example()
    query, key = example["queries"][0], example["keys"][0]
    layer = policy.observe(
        query, key, key, prompt, policy.row_index(prompt), sm_scale=example["sm_scale"]
    )
    pooled = policy.ranking(layer, policy.priority(prompt, torch.tensor([5])))
    expected = [0.10055, 0.15129, 0.14319, 0.11827, 0.10723, 0.06459]
    assert (pooled[0, 0, :6] / 2).tolist() == pytest.approx(expected, abs=5e-6)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **example)
    assert selections is not None
    assert kept_lists(selections[0]) == [[[1, 2, 3, 6, 7]]]


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
def test_mixkv(name: str) -> None:
    """With one layer of one KV head all hosts have the same budgets."""
    policy = policies.get("mixkv", host=name, keep=5, num_sink=0, window=2, pool_kernel=3)
    prompt = make_prompt("tttttttt")
    example = window_example()
    tensors = (example["queries"][0], example["keys"][0], example["values"][0])
    layer: Any = policy.observe(
        *tensors, prompt, policy.row_index(prompt), sm_scale=example["sm_scale"]
    )
    assert layer.similarity[0, 0, :6].tolist() == pytest.approx([0.79, 0.82, 0.79, 0.5, 0.22, 0.65])
    assert float(layer.redundancy) == pytest.approx(0.62571, abs=5e-6)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **example)
    assert selections is not None
    assert kept_lists(selections[0]) == [[[3, 4, 5, 6, 7]]]
    for keep, kept in ((3, [4, 6, 7]), (4, [4, 5, 6, 7]), (6, [2, 3, 4, 5, 6, 7])):
        fewer = policies.get("mixkv", host=name, keep=keep, num_sink=0, window=2, pool_kernel=3)
        _, _, selections = policies.evict_prompt(fewer, prompt=prompt, **example)
        assert selections is not None
        assert kept_lists(selections[0]) == [[kept]]


def test_adakv_original_floor_drifts() -> None:
    """Five tokens for each of two heads, window 2: nine of ten places are used."""
    scores = torch.tensor([[[9.0, 8, 7, 6, 0, 0, 1, 1], [5, 4, 0, 0, 0, 0, 1, 1]]])
    layer = LayerScores(scores, make_prompt("tttttttt"))
    policy = AdaKV(keep=5, num_sink=0, window=2, pool_kernel=1, floor_rule="original")
    # Four and two winners: round(0.8 * 4 + int(0.2 * 3)) = 3, round(1.6) = 2, and the window.
    assert policy.budgets([layer]).tolist() == [[[5, 4]]]
    exact = AdaKV(keep=5, num_sink=0, window=2, pool_kernel=1, floor=0.2)
    assert exact.budgets([layer]).tolist() == [[[6, 4]]]
    # Three sure keys besides the window leave nothing to compete for.
    assert AdaKV(keep=5, num_sink=0, window=2, pool_kernel=1, floor=1.0).budgets(
        [layer]
    ).tolist() == [[[5, 5]]]


@pytest.mark.parametrize(("beta", "num_sink"), [(20, 0), (20, 4), (3, 0), (1, 2)])
@pytest.mark.parametrize("accounting", ["original", "kvpress"])
@pytest.mark.parametrize("num_layers", [1, 2, 7, 32])
def test_pyramidkv_keeps_its_total(
    num_layers: int, accounting: Any, beta: int, num_sink: int
) -> None:
    prompt = make_prompt("t" * 300)
    layers = [LayerScores(torch.zeros(1, 2, 300), prompt)] * num_layers
    for keep in (0.2, 64, 65, 200, 299):
        policy = PyramidKV(keep=keep, window=8, num_sink=num_sink, beta=beta, accounting=accounting)
        budgets = policy.budgets(layers)[:, 0].tolist()
        assert sum(budgets) == num_layers * int(policy.keep_tokens(prompt))
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[-1] >= num_sink + 8
        assert budgets[0] <= 300


def test_pyramidkv_budgets() -> None:
    prompt = make_prompt("t" * 1000)
    layers = [LayerScores(torch.zeros(1, 2, 1000), prompt)] * 3

    def budgets(**fields: Any) -> Any:
        return PyramidKV(keep=64, num_sink=0, **fields).budgets(layers)[:, 0].tolist()

    # base 32, low 1.6, high 62.4
    assert budgets(window=32) == [94, 64, 34]
    # low 3.2 holds no window
    assert budgets(window=32, accounting="kvpress") == [64, 64, 64]
    assert budgets(window=2, accounting="kvpress") == [125, 64, 3]


def test_chunkkv() -> None:
    scores = torch.tensor([[[0.0, 9, 1, 1, 1, 1, 2, 0, 3, 0, 0, 0]]])
    prompt = make_prompt("t" * 12)
    layer = LayerScores(scores, prompt)
    policy = ChunkKV(keep=7, num_sink=1, window=2, pool_kernel=1, chunk_len=3)
    priority = policy.priority(prompt, torch.tensor([7]))
    # Chunks 0-2, 3-5, 6-8, 9-11 without token 0 and the window 10, 11.
    means = [5.0] * 3 + [1.0] * 3 + [5 / 3] * 3 + [0.0] * 3
    assert policy.ranking(layer, priority)[0, 0].tolist() == pytest.approx(means)
    kept_indices, _ = policy.select(layer, torch.tensor([7]), 7)
    assert kept_indices.tolist() == [[[0, 1, 2, 6, 7, 10, 11]]]
    kept_indices, _ = policy.select(layer, torch.tensor([8]), 8)
    assert kept_indices.tolist() == [[[0, 1, 2, 6, 7, 8, 10, 11]]]


def test_chunkkv_reuses_the_first_layer_of_a_run() -> None:
    prompt = make_prompt("t" * 40)
    policy = ChunkKV(keep=0.4, window=4, chunk_len=3, num_reuse=2)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **make_layers(prompt, 5))
    assert selections is not None
    lists = [kept_lists(s)[0][0] for s in selections]
    assert lists[0] == lists[1] != lists[2] == lists[3] != lists[4]
    other = make_prompt("t" * 40)
    layers = [LayerScores(torch.randn(1, 1, 40), p) for p in (prompt, prompt, other, prompt)]
    revised = policy.revise(layers)
    assert [r.scores is s.scores for r, s in zip(revised, layers, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


# The others


@pytest.mark.parametrize(("length", "ratio"), [(50, 0.5), (97, 0.3), (21, 0.41)])
def test_streaming_llm_drops_the_block_behind_the_sinks(length: int, ratio: float) -> None:
    prompt = make_prompt("i" * length)
    _, _, selections = policies.evict_prompt(
        StreamingLLM(keep=ratio), prompt=prompt, **make_layers(prompt)
    )
    assert selections is not None
    num_pruned = length - int(length * ratio)
    expected = [j for j in range(length) if not 4 <= j < 4 + num_pruned]
    assert kept_lists(selections[0]) == [[expected]]


def test_prefixkv_sizes() -> None:
    """A layer that spreads its attention gets more."""
    prompt = make_prompt("t" * 8)
    sharp = torch.tensor([[[64.0, 16, 8, 4, 4, 2, 1, 1]]])
    even = torch.tensor([[[9.0, 10, 11, 12, 13, 14, 15, 16]]])
    layers = [LayerScores(scores, prompt) for scores in (sharp, even)]
    policy = PrefixKV(keep=4, num_sink=1, num_recent=1)
    # Curves: .64 .80 .88 .92 .96 .98 | .16 .31 .45 .58 .69 .79. Four places are free: p = .64.
    assert policy.budgets(layers).tolist() == [[2], [6]]


def test_prefixkv_sizes_of_equal_layers() -> None:
    prompt = make_prompt("t" * 20)
    layers = [LayerScores(torch.rand(1, 1, 20), prompt)] * 3
    # Three sizes rise at once, so two places of 3 * 7 may stay empty.
    assert PrefixKV(keep=7).budgets(layers).tolist() == [[7], [7], [7]]


def attention_example(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return query and key of one head with this attention in the last rows."""
    length = len(rows[0])
    attention = torch.eye(length)
    attention[length - len(rows) :] = torch.tensor(rows)
    return attention.clamp(min=1e-30).log()[None, None], torch.eye(length)[None, None]


ROWS = [
    [0.50, 0.02, 0.10, 0.01, 0.05, 0.12, 0.20, 0.00],
    [0.40, 0.001, 0.02, 0.03, 0.06, 0.089, 0.20, 0.20],
]


def test_grounded_scores() -> None:
    """Head 0 looks with both rows, head 1 elsewhere; a key that one head ignores gets a quarter."""
    prompt = make_prompt("tiiiiitt")
    query, key = attention_example(ROWS)
    elsewhere, _ = attention_example([[0.0, 1.0, *[0.0] * 6]] * 2)
    policy = Grounded(keep=0.5)
    layer = policy.observe(
        torch.cat([query, elsewhere], 1), key, key, prompt, policy.row_index(prompt), sm_scale=1.0
    )
    expected = torch.tensor(ROWS).amax(0) / 4
    expected[1] = ((0.02**0.5 + 1) / 2) ** 2
    assert layer.scores[0, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_grounded_budgets() -> None:
    prompt = make_prompt("tiiiiitt")
    rows = ([0.9, 0.3, 0.05, 0.5, 0.1, 0.05, 0.6, 0.8], [0.9, *[0.2] * 5, 0.8, 0.6])
    layers = [LayerScores(torch.tensor([[row]]), prompt) for row in rows]
    # Vision is worth .5, .3 sqrt(.5) = .212, .1 sqrt(.2) = .045 in layer 0, and
    # .2, .2 sqrt(.8) = .179, .2 sqrt(.6) = .155, .2 sqrt(.4) = .126 in layer 1.
    assert Grounded(keep=4).budgets(layers)[:, 0].tolist() == [4, 4]  # 2 of text, 4 of vision
    assert Grounded(keep=5).budgets(layers)[:, 0].tolist() == [5, 5]  # 3 of text, 4 of vision
    assert Grounded(keep=6).budgets(layers)[:, 0].tolist() == [5, 7]  # 6 of vision
    # Half of 4 is the first and the last token; the text between them goes, whatever its score.
    kept, _ = Grounded(keep=4).select(layers[0], torch.tensor([4]), 4)
    assert kept[0, 0].tolist() == [0, 1, 3, 7]
    kept, _ = Grounded(keep=6).select(layers[0], torch.tensor([5]), 5)
    assert kept[0, 0].tolist() == [0, 1, 3, 6, 7]


def test_grounded_gives_nothing_for_nan() -> None:
    prompt = make_prompt("tiiiiitt")
    row = torch.tensor([0.9, 0.3, 0.05, 0.5, 0.1, 0.05, 0.6, 0.8])
    broken = row.clone()
    broken[2] = torch.nan
    layers = [LayerScores(scores[None, None], prompt) for scores in (broken, row)]
    assert Grounded(keep=4).budgets(layers)[:, 0].tolist() == [4, 4]
    kept, _ = Grounded(keep=4).select(layers[0], torch.tensor([4]), 4)
    assert kept[0, 0].tolist() == [0, 1, 3, 7]


def test_grounded_keeps_text_where_there_is_no_vision_to_take_its_place() -> None:
    prompt = make_prompt("tttttitt")
    layers = [LayerScores(torch.rand(1, 1, 8), prompt) for _ in range(2)]
    assert Grounded(keep=6).budgets(layers)[:, 0].tolist() == [6, 6]
    kept, _ = Grounded(keep=6).select(layers[0], torch.tensor([6]), 6)
    assert 5 in kept[0, 0].tolist()


def test_vl_cache_density() -> None:
    prompt = make_prompt("tiiiiitt")
    query, key = attention_example(ROWS)
    for threshold, used in ((0.01, 7 + 7), (0.03, 6 + 7), (0.5, 1 + 3), (0.0, 15), (1.0, 2)):
        policy = VLCache(keep=0.5, threshold=threshold)
        layer = policy.observe(query, key, key, prompt, policy.row_index(prompt), sm_scale=1.0)
        assert layer.mass is not None
        assert layer.mass.tolist() == pytest.approx([used / 15])
    assert layer.scores[0, 0].tolist() == pytest.approx(torch.tensor(ROWS).sum(0).tolist())


def test_vl_cache_budgets() -> None:
    prompt = make_prompt("t" * 10 + "i" * 900 + "t" * 90)
    layers = [
        LayerScores(torch.zeros(1, 1, 1000), prompt, torch.tensor([mass]))
        for mass in (0.6, 0.3, 0.0)
    ]
    # 3 * 0.5 * (2/3, 1/3, 0), clipped to [0.01, 1]
    assert VLCache(keep=0.5).budgets(layers)[:, 0].tolist() == [1000, 500, 10]
    layers = layers[:2]
    assert VLCache(keep=0.9).budgets(layers)[:, 0].tolist() == [1000, 600]
    assert VLCache(keep=0.9, redistribute=True).budgets(layers)[:, 0].tolist() == [1000, 800]
    priority = VLCache(keep=0.5).priority(prompt, torch.tensor([250]))
    assert (priority[0] == 3).nonzero().flatten().tolist() == [*range(4), *range(975, 1000)]


def test_corm() -> None:
    """Rows 6 and 7 see 7 and 8 keys: minor is what gets less than 1/7 and less than 1/8."""
    prompt = make_prompt("tttttttt")
    query, key = attention_example(ROWS)
    policy = CORM(window=2, num_recent=1, num_sink=0)
    layer = policy.observe(query, key, key, prompt, policy.row_index(prompt), sm_scale=1.0)
    expected = [max(7 * a, 8 * b) for a, b in zip(*ROWS, strict=True)]
    assert layer.scores[0, 0].tolist() == pytest.approx(expected)
    assert policy.budgets([layer]).tolist() == [[[3]]]
    kept_indices, _ = policy.select(layer, torch.tensor([[3]]), 3)
    assert kept_indices.tolist() == [[[0, 6, 7]]]
    assert CORM(window=1, num_recent=4, num_sink=2).budgets([layer]).tolist() == [[[6]]]


def test_dbudgetkv_halts_before_the_norm_falls() -> None:
    prompt = make_prompt("tttttttt")
    energy = torch.tensor([[[50.0, 1, 1, 1, 1, 16, 20, 10]]])
    layers = [LayerScores(energy, prompt)] * 4
    policy = DBudgetKV(num_sink=1, num_recent=1, tolerance=0.01)
    # sqrt(1 - 1/100) = .995, sqrt(1 - 2/100) = .98995
    assert policy.budgets(layers)[:, 0].tolist() == [8, 8, 7, 7]
    kept_indices, _ = policy.select(layers[0], torch.tensor([7]), 7)
    assert kept_indices.tolist() == [[[0, 2, 3, 4, 5, 6, 7]]]
    looser = DBudgetKV(num_sink=1, num_recent=1, tolerance=0.1, num_full=1)
    assert looser.budgets(layers)[:, 0].tolist() == [8, 4, 4, 4]
    # 4 * 4 places: 8 for the exempt layer leave 8 // 3 for the others.
    limited = DBudgetKV(keep=4, num_sink=1, num_recent=1, tolerance=0.1, num_full=1)
    assert limited.budgets(layers)[:, 0].tolist() == [8, 2, 2, 2]
    # 4 * 3 places: the others need their 2 forced keys, so the exempt layer gets 6.
    tight = DBudgetKV(keep=3, num_sink=1, num_recent=1, tolerance=0.1, num_full=1)
    assert tight.budgets(layers)[:, 0].tolist() == [6, 2, 2, 2]
    whole = DBudgetKV(num_full=4)
    assert whole.budgets(layers[:3])[:, 0].tolist() == [8, 8, 8]
    assert DBudgetKV(keep=5, num_full=4).budgets(layers[:3])[:, 0].tolist() == [5, 5, 5]


def test_random_is_the_same_everywhere() -> None:
    """A fixed list, whatever the device, the version of torch or the batch."""
    prompt = make_prompt("tttttttttttttttttttt")
    layers = make_layers(prompt)
    lists = {}
    for per_head in (False, True):
        policy = Random(keep=8, seed=3, per_head=per_head)
        _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
        assert selections is not None
        lists[per_head] = [kept[4:] for s in selections for kept in kept_lists(s)[0]]
    assert lists[False] == [[4, 8, 12, 18]] * 3
    assert lists[True][:3] == [[4, 8, 12, 18], [9, 10, 13, 19], [7, 11, 16, 18]]
    assert lists[True][3:] == [[11, 12, 13, 14], [6, 8, 9, 10], [6, 8, 16, 19]]
    assert Random(keep=8, seed=4) != Random(keep=8, seed=3)
