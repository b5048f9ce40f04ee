"""Decode-time eviction against loops over Python lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvevict.policies import H2O, StreamingLLM
from tests.policies.cases import make_prompt
from tests.policies.decoding import List, Rule, Tokens, decode, decode_by_loops

PROMPTS = {
    "single": ["tttttiiiiiiiiiiiiiittttttt"],
    "two_images": ["tttiiiiiitttiiiiiiiiiitttt"],
    "left_padded": [
        "......tttiiiiiiiiiiittttt",
        "ttttiiiiiiittiiiiiiiiittt",
        "..tiiiiiiiiiiiiiiiiiiiiit",
    ],
}
NUM_STEPS, NUM_LAYERS = 24, 2


def h2o_rule(policy: H2O, limit: int) -> Rule:
    """Drop the lowest sum that is neither sink nor recent."""
    num_recent = int(limit * policy.recent_share + 1e-6)
    num_sink = min(policy.num_sink, limit - num_recent)

    def rule(own: List, attention: dict[int, float], seen: int) -> None:
        own.add(attention)
        while len(own.live) > limit:
            middle = [c for c in own.live if num_sink <= c < seen - num_recent]
            own.drop([min(middle, key=lambda c: own.scores[c])])

    return rule


def streaming_rule(policy: StreamingLLM, limit: int) -> Rule:
    """Drop slot num_sink."""

    def rule(own: List, attention: dict[int, float], seen: int) -> None:
        while len(own.live) > limit:
            own.drop([min(c for c in own.live if c >= min(policy.num_sink, limit))])

    return rule


RULES: dict[str, tuple[Any, Any]] = {
    "h2o": (H2O(keep=0.4), h2o_rule),
    "h2o_tokens": (H2O(keep=9, num_sink=2, recent_share=0.3), h2o_rule),
    "h2o_grows_first": (H2O(keep=30, num_sink=0), h2o_rule),
    "h2o_tiny": (H2O(keep=2), h2o_rule),
    "streaming": (StreamingLLM(keep=0.4), streaming_rule),
    "streaming_grows_first": (StreamingLLM(keep=29, num_sink=2), streaming_rule),
}


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("name", RULES)
def test_what_stays_equals_the_loops(name: str, prompt_name: str) -> None:
    policy, make_rule = RULES[name]
    rows = PROMPTS[prompt_name]
    prompt = make_prompt(*rows)
    tokens = Tokens.draw(len(rows), prompt.kv_len + NUM_STEPS, NUM_LAYERS)
    run = decode(policy, prompt, tokens, NUM_STEPS)
    for b, row in enumerate(rows):
        padding, length = row.count("."), len(row) - row.count(".")
        kept = [[[c - padding for c in own] for own in layer[b]] for layer in run.live[0]]
        limits = [
            [policy.keep if isinstance(policy.keep, int) else len(own) for own in lists]
            for lists in kept
        ]
        expected = decode_by_loops(
            tokens.of_sequence(b, padding),
            length,
            kept,
            [layer.scores[b, :, padding:] for layer in run.scores],
            [[make_rule(policy, limit) for limit in lists] for lists in limits],
            NUM_STEPS,
        )
        for step, theirs in enumerate(expected, 1):
            ours = [[[c - padding for c in own] for own in layer[b]] for layer in run.live[step]]
            assert ours == theirs, f"step {step} of sequence {b}"
