"""Every policy of the registry against its oracle, sequence by sequence."""

from __future__ import annotations

import pytest
import torch

from kvevict import policies
from tests.policies.cases import (
    CASES,
    FIELDS,
    PROMPTS,
    kept_of,
    make_layers,
    make_prompt,
    one_sequence,
)
from tests.policies.oracles import ORACLES, Sequence, keep_by_oracle


def test_every_policy_has_cases_and_an_oracle() -> None:
    assert sorted(FIELDS) == sorted(ORACLES) == policies.list()


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("case", CASES)
def test_a_policy_equals_its_oracle(case: str, prompt_name: str) -> None:
    name, policy = CASES[case]
    rows = PROMPTS[prompt_name]
    prompt = make_prompt(*rows)
    layers = make_layers(prompt)
    keys, values, selections = policies.evict_prompt(policy, prompt=prompt, **layers)
    for b, row in enumerate(rows):
        alone = one_sequence(layers, b, row)
        sequence = Sequence(row.replace(".", ""), *([t[0] for t in ts] for ts in alone.values()))
        expected = keep_by_oracle(name, policy, sequence)
        actual = kept_of(selections, b, row, len(keys))
        for layer, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            theirs = theirs * (len(ours) // len(theirs))
            assert ours == theirs, f"layer {layer} of sequence {b}"
            for head in range(keys[layer].shape[1]):
                kept = theirs[head % len(theirs)]
                for new, old in ((keys, alone["keys"]), (values, alone["values"])):
                    if selections is not None:
                        assert torch.equal(
                            new[layer][b, head, : len(kept)], old[layer][0, head, kept]
                        )
                        assert (new[layer][b, head, len(kept) :] == 0).all()
