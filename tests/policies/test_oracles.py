"""Every policy of the registry against its oracle, sequence by sequence."""

from __future__ import annotations

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


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_is_moved(case: str) -> None:
    _, policy = CASES[case]
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    assert selections is not None
    for layer, selection in enumerate(selections):
        lists = kept_lists(selection)
        lens = [len(kept) for rows in lists for kept in rows]
        assert selection.kept_indices.shape[2] == max(lens)
        assert selection.ragged == (min(lens) < max(lens))
        assert selection.keeps_all == (min(lens) == prompt.kv_len)
        for b, rows in enumerate(lists):
            for head, kept in enumerate(rows * (NUM_KV_HEADS // len(rows))):
                for new, old in ((keys, layers["keys"]), (values, layers["values"])):
                    assert torch.equal(new[layer][b, head, : len(kept)], old[layer][b, head, kept])
                    assert (new[layer][b, head, len(kept) :] == 0).all() or selection.keeps_all
