"""HAE: worked examples, the lemma behind lazy eviction, one plan for all layers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict import ops, policies
from kvevict.policies import HAE, LayerScores, Prompt, Selection
from kvevict.slots import Slots, evict_layers, select_slots
from tests.policies.cases import PROMPTS, kept_lists, make_layers, make_prompt
from tests.policies.decoding import (
    Run,
    Tokens,
    assert_equal_loops,
    bin_rule,
    block_of,
    decode,
    live_columns,
)

# Dual-Attention Pruning


def example_layer() -> tuple[Tensor, Tensor]:
    """Return a query and a key whose attention is that of the example: logits = log A."""
    tables = [
        [
            [0.50, 0.02, 0.10, 0.01, 0.05, 0.12, 0.20, 0.00],
            [0.40, 0.01, 0.02, 0.03, 0.06, 0.08, 0.20, 0.20],
        ],
        [
            [0.46, 0.04, 0.10, 0.01, 0.15, 0.04, 0.20, 0.00],
            [0.36, 0.03, 0.02, 0.01, 0.04, 0.14, 0.20, 0.20],
        ],
    ]
    attention = torch.ones(2, 8, 8)
    attention[:, 6:] = torch.tensor(tables)
    return attention.clamp(min=1e-30).log()[None], torch.eye(8)[None, None]


@pytest.mark.parametrize(
    ("fields", "evicted"),
    [
        ({"ratio": 0.15, "alpha": 0.05}, {1, 3}),
        ({"ratio": 0.30, "alpha": 0.20}, {1, 2, 3, 4}),
        ({"ratio": 0.15, "alpha": 0.0199}, set()),
        ({"ratio": 0.30, "alpha": 0.20, "max_evicted": 1}, {3}),
        ({"ratio": 1.01, "alpha": 1.0}, {1, 2, 3, 4}),
        ({"ratio": 1.01, "alpha": 1.0, "num_sink": 4}, {4}),
        ({"kappa": 0.75, "alpha": 0.05}, {1, 3}),
    ],
)
def test_pruning_example(fields: dict[str, Any], evicted: set[int]) -> None:
    query, key = example_layer()
    prompt = make_prompt("tiiiiitt")
    policy = HAE(**{"num_sink": 0, **fields})
    layer = policy.observe(query, key, key, prompt, policy.row_index(prompt), sm_scale=1.0)
    assert layer.scores[0, 0, 1:6].tolist() == pytest.approx([0.05, 0.12, 0.03, 0.15, 0.19])
    assert set(layer.victims[0].nonzero().flatten().tolist()) == evicted


def test_one_decision_and_one_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 alone is scored twice; every layer keeps its list, moved by a single call."""
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt, num_layers=4)
    calls: list[str] = []
    for name in ("score_keys", "gather_kv"):
        op = getattr(ops, name)

        def counted(*args: Any, _op: Any = op, _name: str = name, **options: Any) -> Any:
            calls.append(_name)
            return _op(*args, **options)

        monkeypatch.setattr(ops, name, counted)
    policy = HAE(kappa=1.0, alpha=1.0, scope="layer0")
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    assert all(torch.equal(s.kept_indices, selections[0].kept_indices) for s in selections)
    assert calls == ["score_keys", "score_keys", "gather_kv"]
    monkeypatch.undo()
    other = {name: tensors[:1] for name, tensors in layers.items()}
    _, _, first = policies.evict_prompt(policy, prompt=prompt, **other)
    assert first is not None
    assert kept_lists(first[0]) == kept_lists(selections[3])


def test_the_pruned_rows_are_those_of_the_cache() -> None:
    """`drop_hidden` takes out what layer 0 does not keep; later layers keep what they get."""
    prompt = make_prompt(*PROMPTS["left_padded"])
    query, key, value = (ts[0] for ts in make_layers(prompt, num_layers=1).values())
    policy = HAE(kappa=1.0, alpha=1.0, drop_hidden=True)
    assert list(policy.shortening_layers(4)) == [0]
    assert list(HAE().shortening_layers(4)) == []
    first = policy.observe(query, key, value, prompt, policy.row_index(prompt))
    shortening = policy.shorten(
        torch.zeros(3, prompt.kv_len, 4), query, key, prompt, stage=0, scores=first
    )
    assert shortening is not None
    (selection,) = policies.select_layers(policy, [first]) or ()
    assert kept_lists(shortening.selection) == kept_lists(selection)
    rest = make_prompt("ttttttiitttt", ".titiiiittt.".replace(".", "t"), "tttttttttttt")
    left = Prompt(rest.modality, rest.key_mask, total_lens=torch.tensor([25, 25, 25]))
    query, key, value = (ts[0] for ts in make_layers(left, num_layers=1).values())
    later = policy.observe_later(first, query, key, value, left, policy.row_index(left))
    assert policies.select_layers(policy, [later]) is None


# The recycle bin


def block_with_scores(kept: list[int], scores: list[float], prompt_len: int) -> Slots:
    """Return a layer that has kept these columns with these scores."""
    prompt = make_prompt("t" * prompt_len)
    block = block_of(prompt, torch.zeros(1, 1, prompt_len, 8), torch.zeros(1, 1, prompt_len, 8))
    block.track(torch.zeros(1, 1, prompt_len))
    selection = Selection(
        torch.tensor([[kept]], dtype=torch.int32), torch.tensor([[len(kept)]], dtype=torch.int32)
    )
    slots = select_slots([block], [selection])[0].slots
    slots.scores.copy_(torch.tensor(scores))
    return slots


def add(slots: Slots, attention: dict[int, float]) -> None:
    """Append a key and add attention to the scores, by column."""
    row = torch.zeros(1, 1, 1, 8)
    slots.append(row, row)
    slots.scores.add_(torch.tensor([attention.get(c, 0.0) for c in slots.columns[0, 0].tolist()]))


@pytest.mark.parametrize(
    ("bin_len", "expected"), [(2, [0, 2, 5, 6, 7, 9]), (1, [0, 4, 5, 6, 7, 9])]
)
def test_bin_example(bin_len: int, expected: list[int]) -> None:
    """Key 2 is binned first, and restored when key 4 deserves it more."""
    policy = HAE(num_sink=1, num_recent=1, bin_len=bin_len)
    slots = block_with_scores([0, 2, 4, 5, 6, 7], [4, 0.5, 0.45, 0.9, 1.2, 0.6], 8)
    policy.begin_decoding([slots], [])
    first = {0: 0.4, 2: 0.02, 4: 0.08, 5: 0.1, 6: 0.2, 7: 0.1, 8: 0.1}
    second = {0: 0.4, 2: 0.3, 4: 0.02, 5: 0.05, 6: 0.1, 7: 0.03, 8: 0.05, 9: 0.05}
    for attention in (first, second):
        add(slots, attention)
        evict_layers([slots], policy.evict_step([slots]))
    assert live_columns([slots]) == [[[expected]]]


class RecycleBin:
    """The rule to the letter: marks, restores, and deletes all that is marked."""

    def __init__(self, live: list[int], scores: list[float], policy: HAE, limit: int) -> None:
        self.live, self.scores = list(live), dict(zip(live, scores, strict=True))
        self.policy, self.limit = policy, limit
        self.binned: list[int] = []

    def step(self, column: int, attention: dict[int, float]) -> None:
        self.live.append(column)
        for c in [*self.live, *self.binned]:
            self.scores[c] = self.scores.get(c, 0.0) + attention.get(c, 0.0)
        while len(self.live) > self.limit:
            worst = self.worst(column)
            self.live.remove(worst)
            self.binned.append(worst)
        while True:  # Restore.
            best, worst = max(self.binned, key=self.scores.__getitem__), self.worst(column)
            if self.scores[best] <= self.scores[worst]:
                break
            self.live.remove(worst)
            self.binned.remove(best)
            self.live.append(best)
            self.binned.append(worst)
        if len(self.binned) == self.policy.bin_len:
            self.binned = []

    def worst(self, newest: int) -> int:
        recent = newest - self.policy.num_recent
        middle = [c for c in self.live if self.policy.num_sink <= c <= recent]
        return min(middle, key=self.scores.__getitem__)


@pytest.mark.parametrize("seed", range(40))
def test_lazy_eviction_is_the_recycle_bin_with_restore(seed: int) -> None:
    rng = random.Random(seed)
    limit, num_sink = rng.randint(6, 14), rng.randint(0, 2)
    policy = HAE(num_sink=num_sink, num_recent=rng.randint(1, 3), bin_len=rng.randint(1, 6))
    kept = sorted([*range(num_sink), *rng.sample(range(num_sink, 20), limit - num_sink)])
    scores = [rng.random() for _ in kept]
    slots = block_with_scores(kept, scores, 20)
    policy.begin_decoding([slots], [])
    literal = RecycleBin(kept, scores, policy, limit)
    for column in range(20, 80):
        columns = [c for c in slots.columns[0, 0].tolist() if c >= 0] + [column]
        attention = {c: rng.random() ** 3 for c in columns}
        add(slots, attention)
        evict_layers([slots], policy.evict_step([slots]))
        literal.step(column, attention)
        assert live_columns([slots]) == [[[sorted(literal.live + literal.binned)]]]


def test_one_compaction_per_bin() -> None:
    """The buffer needs limit + bin_len slots, and is touched once in bin_len steps."""
    policy = HAE(limit=12, bin_len=5, num_recent=2)
    slots = block_with_scores(list(range(10)), [1.0] * 10, 10)
    policy.begin_decoding([slots], [])
    evicted = []
    for column in range(10, 60):
        add(slots, {column: 0.01 * column})
        (victims,) = policy.evict_step([slots])
        if victims is not None:
            evicted.append(column)
            assert slots.stored == 17
            assert victims.slots.shape == (1, 1, 5)
            evict_layers([slots], [victims])
    assert evicted == [16, 21, 26, 31, 36, 41, 46, 51, 56]
    assert isinstance(slots.grown, int)


# Against loops

DECODE_PROMPTS = ["two_images", "left_padded"]


@pytest.mark.parametrize("prompt_name", DECODE_PROMPTS)
@pytest.mark.parametrize(
    "policy",
    [
        HAE(kappa=1.0, alpha=1.0, bin_len=3, num_recent=4),
        HAE(kappa=1.0, alpha=1.0, bin_len=1, num_recent=2, decay=0.9),
        HAE(kappa=1.0, alpha=1.0, bin_len=4, num_recent=2, limit=16),
        HAE(alpha=0.0, bin_len=4, num_recent=2, vision_first=True, limit=9),
    ],
    ids=range(4),
)
def test_decoding_equals_the_loops(policy: HAE, prompt_name: str) -> None:
    def rules_of(run: Run, b: int, kept: list[list[list[int]]]) -> Any:
        return [[bin_rule(policy, policy.limit or len(own)) for own in lists] for lists in kept]

    assert_equal_loops(policy, PROMPTS[prompt_name], rules_of)


@pytest.mark.parametrize("prompt_name", DECODE_PROMPTS)
@pytest.mark.parametrize("scope", ["layer0", "mean"])
def test_one_list_for_all_layers(prompt_name: str, scope: Any) -> None:
    """All layers drop the same keys: what layer 0 alone would, or the mean of the sums."""
    policy = HAE(kappa=1.0, alpha=1.0, bin_len=3, num_recent=4, scope=scope)
    prompt = make_prompt(*PROMPTS[prompt_name])
    tokens = Tokens.draw(len(PROMPTS[prompt_name]), prompt.kv_len + 12, 3)
    run = decode(policy, prompt, tokens, 12)
    for live in run.live:
        assert live[0] == live[1] == live[2]
    alone = Tokens(*([ts[0]] for ts in vars(tokens).values()))
    own = decode(HAE(kappa=1.0, alpha=1.0, bin_len=3, num_recent=4), prompt, alone, 12)
    same = [live[0] for live in run.live] == [live[0] for live in own.live]
    assert same == (scope == "layer0")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": -0.1}, "ratio must be a number of at least 0, got -0.1"),
        ({"alpha": None}, "alpha must be a number of at least 0, got None"),
        ({"kappa": float("nan")}, "kappa must be a number of at least 0, got nan"),
        ({"bin_len": 0}, "bin_len must be an int of at least 1, got 0"),
        ({"limit": 0}, "limit must be an int of at least 1, got 0"),
        ({"max_evicted": -1}, "max_evicted must be an int of at least 0, got -1"),
        ({"scope": "all"}, "scope must be 'per_layer' or 'layer0' or 'mean', got 'all'"),
        ({"decode": True}, "decode must be 'evict' or 'append', got True"),
    ],
)
def test_refused_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HAE(**fields)


def test_scores_of_another_kind_of_layer_are_refused() -> None:
    with pytest.raises(AssertionError):
        HAE().budgets([LayerScores(torch.zeros(1, 1, 4), make_prompt("tiit"))])
