"""Every policy of the registry against its oracle, sequence by sequence."""

from __future__ import annotations

import copy

import pytest
import torch

from kvevict import policies
from tests.policies.cases import (
    CASES,
    FIELDS,
    NUM_KV_HEADS,
    PROMPTS,
    kept_lists,
    kept_of,
    make_layers,
    make_prompt,
    one_sequence,
)
from tests.policies.merge_oracles import MERGES, merge_by_oracle
from tests.policies.oracles import ORACLES, Sequence, keep_by_oracle


def test_every_policy_has_cases_and_an_oracle() -> None:
    assert sorted(FIELDS) == sorted(ORACLES) == policies.list(with_keep=True)


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("case", CASES)
def test_a_policy_equals_its_oracle(case: str, prompt_name: str) -> None:
    name, policy = CASES[case]
    rows = PROMPTS[prompt_name]
    prompt = make_prompt(*rows)
    layers = make_layers(prompt)
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    for b, row in enumerate(rows):
        alone = one_sequence(layers, b, row)
        sequence = Sequence(row.replace(".", ""), *([t[0] for t in ts] for ts in alone.values()))
        expected = keep_by_oracle(name, policy, sequence)
        actual = kept_of(selections, b, row, len(expected))
        for layer, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert ours == theirs * (len(ours) // len(theirs)), f"layer {layer} of sequence {b}"


@pytest.mark.parametrize("prompt_name", ["left_padded", "two_images"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_is_moved(case: str, prompt_name: str) -> None:
    """Bit for bit, or merged as the oracle says; the tensors given are as they were."""
    name, policy = CASES[case]
    rows = PROMPTS[prompt_name]
    prompt = make_prompt(*rows)
    layers = make_layers(prompt)
    given = copy.deepcopy(layers)
    keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    for tensors, before in zip(layers.values(), given.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert selections is not None
    for selection in selections:
        lens = [len(kept) for lists in kept_lists(selection) for kept in lists]
        assert selection.kept_indices.shape[2] == max(lens)
        assert selection.ragged == (min(lens) < max(lens))
        assert selection.keeps_all == (min(lens) == prompt.kv_len)
    for b, row in enumerate(rows):
        padding = row.count(".")
        alone = one_sequence(layers, b, row)
        sequence = Sequence(row.replace(".", ""), *([t[0] for t in ts] for ts in alone.values()))
        lists = kept_of(selections, b, row, len(keys))
        stored = merge_by_oracle(name, policy, sequence, lists)
        for layer, (selection, theirs) in enumerate(zip(selections, stored, strict=True)):
            for head, kept in enumerate(lists[layer] * (NUM_KV_HEADS // len(lists[layer]))):
                pairs = [(keys[layer], theirs.keys), (values[layer], theirs.values)]
                if selection.key_weight is not None:
                    weights = selection.key_weight.expand(-1, NUM_KV_HEADS, -1)[..., None]
                    pairs.append((weights, theirs.weights[..., None]))
                else:
                    assert (theirs.weights[head, kept] == 1).all()
                for ours, expected in pairs:
                    if selection.keeps_all:
                        own = ours[b, head, padding:]
                    else:
                        own = ours[b, head, : len(kept)]
                        assert (ours[b, head, len(kept) :] == 0).all()
                    tolerance = 1e-5 if name in MERGES else 0.0
                    torch.testing.assert_close(
                        own.double(), expected[head, kept], rtol=tolerance, atol=tolerance
                    )


def test_what_has_no_source_keeps_every_byte() -> None:
    """A kept key into which nothing is merged is as it was, in every merging policy."""
    prompt = make_prompt(*PROMPTS["left_padded"])
    for name, policy in CASES.values():
        if name not in MERGES:
            continue
        layers = make_layers(prompt)
        keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
        assert selections is not None
        untouched = 0
        for layer, selection in enumerate(selections):
            index = selection.kept_indices.expand(-1, NUM_KV_HEADS, -1)[..., None]
            live = index >= 0
            for new, old in ((keys, layers["keys"]), (values, layers["values"])):
                before = old[layer].gather(2, index.clamp(min=0).expand(-1, -1, -1, 8).long())
                same = (new[layer] == before).all(-1, keepdim=True) & live
                changed = ((new[layer] - before).abs() < 1e-6).all(-1, keepdim=True) & live & ~same
                assert not changed.any()
                untouched += int(same.sum())
        assert untouched > 0
