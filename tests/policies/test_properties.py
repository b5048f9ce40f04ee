"""What holds for every policy of the registry, whatever it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict import policies
from kvevict.policies import Prompt
from tests.policies.cases import (
    CASES,
    PROMPTS,
    kept_lists,
    kept_of,
    make_layers,
    make_prompt,
    one_sequence,
    settings_of,
)

LONG_ROW = "t" * 12 + "i" * 120 + "t" * 9 + "i" * 60 + "t" * 29


def evict(policy: Any, prompt: Prompt, layers: dict[str, Any]) -> Any:
    """Return the selections alone."""
    return policies.evict_prompt(policy, prompt=prompt, **layers)[2]


# Data in which much is equal


def tie_scores(layers: dict[str, list[Tensor]]) -> None:
    """Give every row uniform attention."""
    for query in layers["queries"]:
        query.zero_()


def tie_keys(layers: dict[str, list[Tensor]]) -> None:
    """Make all keys of a head equal, and all values."""
    for states in (*layers["keys"], *layers["values"]):
        states.copy_(states[:, :, -1:].clone())


def tie_norms(layers: dict[str, list[Tensor]]) -> None:
    """Give all keys, and all values, the same norm."""
    for states in (*layers["keys"], *layers["values"]):
        states /= states.norm(dim=-1, keepdim=True)


def zero(layers: dict[str, list[Tensor]]) -> None:
    """Make everything 0."""
    for tensors in layers.values():
        for tensor in tensors:
            tensor.zero_()


CHANGES: dict[str, Callable[[dict[str, list[Tensor]]], None]] = {
    "random": lambda layers: None,
    "tied_scores": tie_scores,
    "tied_keys": tie_keys,
    "tied_norms": tie_norms,
    "zero": zero,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_a_loop_over_its_sequences(case: str, change: str) -> None:
    """And every list ascends, holds no padding, starts with its sinks and has its forced end."""
    _, policy = CASES[case]
    for rows in (PROMPTS["left_padded"], PROMPTS["mixed"]):
        prompt = make_prompt(*rows)
        layers = make_layers(prompt)
        CHANGES[change](layers)
        selections = evict(policy, prompt, layers)
        for b, row in enumerate(rows):
            alone = evict(policy, make_prompt(row.replace(".", "")), one_sequence(layers, b, row))
            actual = kept_of(selections, b, row, 3)
            expected = kept_of(alone, 0, row.replace(".", ""), 3)
            for ours, theirs in zip(actual, expected, strict=True):
                assert ours == theirs * (len(ours) // len(theirs))
                for kept in ours:
                    assert kept == sorted(set(kept))
                    assert 0 <= kept[0] <= kept[-1] < len(row) - row.count(".")
                    num_sink = min(settings_of(policy).num_sink, len(kept) // 2)
                    assert kept[:num_sink] == list(range(num_sink))


@pytest.mark.parametrize("case", CASES)
def test_heads_of_a_group_are_interchangeable_and_groups_go_with_their_lists(case: str) -> None:
    _, policy = CASES[case]
    if getattr(policy, "per_head", False):
        return  # By the head's number, whatever it holds.
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    expected = evict(policy, prompt, layers)
    within = {**layers, "queries": [q[:, [1, 0, 3, 2]] for q in layers["queries"]]}
    for ours, theirs in zip(evict(policy, prompt, within), expected, strict=True):
        assert torch.equal(ours.kept_indices, theirs.kept_indices)
    across = {name: [t.roll(t.shape[1] // 2, 1) for t in ts] for name, ts in layers.items()}
    for ours, theirs in zip(evict(policy, prompt, across), expected, strict=True):
        assert torch.equal(ours.kept_indices, theirs.kept_indices.flip(1))
        assert torch.equal(ours.kept_lens, theirs.kept_lens.flip(1))


@pytest.mark.parametrize("case", CASES)
def test_frames_are_as_images(case: str) -> None:
    """A video is vision like an image, separators are text, and both may mix in one prompt."""
    _, policy = CASES[case]
    rows = PROMPTS["padded_videos"]
    prompt = make_prompt(*rows)
    layers = make_layers(prompt)
    as_images = make_prompt(*(row.replace("v", "i") for row in rows))
    same = zip(evict(policy, prompt, layers), evict(policy, as_images, layers), strict=True)
    for ours, theirs in same:
        assert torch.equal(ours.kept_indices, theirs.kept_indices)
        assert torch.equal(ours.kept_lens, theirs.kept_lens)


# Budgets


@pytest.mark.parametrize("name", policies.list(with_keep=True))
@pytest.mark.parametrize("keep", [1.0, 1.5, 20, 1000])
def test_keeping_all_moves_nothing(name: str, keep: float | int) -> None:
    prompt = make_prompt("tttiiiiiiiiiittttttt", "....ttiiiiiiiiittttt")
    layers = make_layers(prompt)
    policy = policies.get(name, keep=keep)
    keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is None
    assert all(a is b for a, b in zip(keys, layers["keys"], strict=True))
    assert all(a is b for a, b in zip(values, layers["values"], strict=True))


# Tokens per layer by which a method's own rule may exceed the budget; its docstring says so.
EXCESS: dict[str, Callable[[Any, int], float]] = {
    "adakv": lambda policy, length: 1 if policy.floor_rule == "original" else 0,
    "flashcache": lambda policy, length: 1,
    "tgv_kv": lambda policy, length: policy.num_sink + policy.num_recent + 1,
    "vl_cache": lambda policy, length: 0.01 * length + 1,
}


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.9, 1, 2, 5, 40, 229])
@pytest.mark.parametrize("name", policies.list(with_keep=True))
def test_everything_that_stays_is_inside_keep(name: str, keep: float | int) -> None:
    """Sinks, windows, whole layers and all: the mean over layers and lists, with default fields."""
    policy = policies.get(name, keep=keep)
    prompt = make_prompt(LONG_ROW)
    selections = evict(policy, prompt, make_layers(prompt, num_layers=4))
    length = len(LONG_ROW)
    budget = keep if isinstance(keep, int) else int(keep * length + 1e-6)
    mean = sum(float(s.kept_lens.float().mean()) for s in selections) / 4
    excess = EXCESS[name](policy, length) if name in EXCESS else 0
    assert 1 <= mean <= budget + excess + 1e-5
    for selection in selections:
        for kept in kept_lists(selection)[0]:
            assert len(kept) >= 1


@pytest.mark.parametrize("name", policies.list(with_keep=True))
def test_a_method_without_a_budget_says_so(name: str) -> None:
    """`keep` may be left out where the method finds the number itself, and only there."""
    prompt = make_prompt(LONG_ROW)
    layers = make_layers(prompt)
    try:
        policy = policies.get(name)
    except TypeError as error:
        assert "keep" in str(error)
        with pytest.raises(ValueError, match="keep must be a positive ratio"):
            policies.get(name, keep=None)
        return
    assert policy == policies.get(name, keep=None)
    for tighter in (100, 10):
        limited = evict(policies.get(name, keep=tighter), prompt, layers)
        assert sum(float(s.kept_lens.float().mean()) for s in limited) <= 3 * tighter


# Unusual prompts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", ["t", "i", "ti", "it", "tit", "..t", "..it", "titititi"])
def test_tiny_prompts(case: str, row: str) -> None:
    _, policy = CASES[case]
    prompt = make_prompt(row)
    length = len(row) - row.count(".")
    for lists in kept_of(evict(policy, prompt, make_layers(prompt)), 0, row, 3):
        for kept in lists:
            assert kept == sorted(set(kept))
            assert 1 <= len(kept) <= length
            assert set(kept) <= set(range(length))


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_and_empty_prompt(case: str) -> None:
    _, policy = CASES[case]
    for shape in ((0, 5), (2, 0)):
        prompt = Prompt(torch.zeros(shape, dtype=torch.int8))
        assert evict(policy, prompt, make_layers(prompt)) is None
    assert policies.evict_prompt(policy, [], [], [], make_prompt("ttt")) == ([], [], None)


@pytest.mark.parametrize("case", CASES)
def test_a_query_of_new_rows_only(case: str) -> None:
    """A later turn: the rows are the last ones of a longer, partly empty list of keys."""
    _, policy = CASES[case]
    row = "ttiiiiii..tttttt"
    prompt = replace(make_prompt(row), qo_len=6, total_lens=torch.tensor([30]))
    selections = evict(policy, prompt, make_layers(prompt, qo_len=6))
    settings = settings_of(policy)
    if settings.keep is not None and int(settings.keep_tokens(prompt)) >= 14:
        assert selections is None
        return
    for selection in selections:
        for kept in kept_lists(selection)[0]:
            assert 1 <= len(kept) <= 14
            assert {8, 9}.isdisjoint(kept)


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case: str) -> None:
    _, policy = CASES[case]
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    halves = {name: [t.bfloat16() for t in tensors] for name, tensors in layers.items()}
    floats = {name: [t.float() for t in tensors] for name, tensors in halves.items()}
    same = zip(evict(policy, prompt, halves), evict(policy, prompt, floats), strict=True)
    for ours, theirs in same:
        both = torch.isin(ours.kept_indices, theirs.kept_indices).float().mean()
        assert both > 0.9


@pytest.mark.parametrize("case", CASES)
def test_the_scale_of_the_logits_is_used(case: str) -> None:
    """A scale of s is the same as queries that are s times as long."""
    name, policy = CASES[case]
    prompt = make_prompt(*PROMPTS["two_images"])
    query, key, value = (tensors[0] for tensors in make_layers(prompt, num_layers=1).values())
    rows = policy.row_index(prompt)
    longer = policy.observe(4 * query, key, value, prompt, rows)
    scaled = policy.observe(query, key, value, prompt, rows, sm_scale=4 * 8**-0.5)
    plain = policy.observe(query, key, value, prompt, rows)
    torch.testing.assert_close(scaled.scores, longer.scores)
    if scaled.mass is not None:
        torch.testing.assert_close(scaled.mass, longer.mass)
    attention_free = {"flashcache", "keydiff", "random", "streaming_llm"}
    assert torch.equal(scaled.scores, plain.scores) == (name in attention_free)


# The registry


def test_registry() -> None:
    assert policies.list() == sorted(policies.list())
    snapkv = policies.get("snapkv", keep=64, window=16)
    assert snapkv == policies.SnapKV(keep=64, window=16)
    assert isinstance(snapkv, policies.PrefillPolicy)
    with pytest.raises(ValueError, match=r"name must be one of \['adakv', .*'zsmerge'\], got 'x'"):
        policies.get("x")
    with pytest.raises(TypeError, match="speed"):
        policies.get("snapkv", keep=0.1, speed=3)


@pytest.mark.parametrize("name", policies.list(with_keep=True))
def test_a_policy_is_a_frozen_dataclass_in_a_file_of_its_name(name: str) -> None:
    policy = policies.get(name, keep=0.25)
    assert isinstance(policy, policies.PrefillPolicy)
    assert type(policy).__module__ == f"kvevict.policies.{name}"
    assert type(policy).__name__ in policies.__all__
    assert hash(policy) == hash(policies.get(name, keep=0.25))
    with pytest.raises(AttributeError, match="cannot assign"):
        policy.keep = 0.5  # type: ignore[attr-defined]
