"""Decode-time eviction against loops over Python lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvevict.policies import (
    D2O,
    H2O,
    HAE,
    TGVKV,
    KeepKV,
    LayerScores,
    Selection,
    StreamingLLM,
    ZSMerge,
)
from kvevict.policies.decode import DecodePolicy
from kvevict.slots import evict_layers, select_slots
from tests.policies.cases import PROMPTS as ALL_PROMPTS
from tests.policies.cases import make_prompt
from tests.policies.decoding import (
    NUM_LAYERS,
    NUM_STEPS,
    List,
    Rule,
    Run,
    Tokens,
    assert_a_turn_is_several_steps,
    assert_equal_loops,
    block_of,
    decode,
    h2o_rule,
    live_columns,
    streaming_rule,
)

PROMPTS = {name: ALL_PROMPTS[name] for name in ("one_image", "two_images", "left_padded")}


def tgv_rule(policy: TGVKV, fraction: float, suffix: int) -> Rule:
    """Drop the lowest of slots [num_sink, n - suffix), if more than M * f + 1 are stored."""

    def rule(own: List, attention: dict[int, float], seen: int) -> None:
        region = own.live[policy.num_sink : max(len(own.live) - suffix, 0)]
        if int(len(own.live) - seen * fraction) > 0 and region:
            own.drop([min(region, key=lambda c: attention[c])])

    return rule


LIMITED: dict[str, tuple[Any, Any]] = {
    "h2o": (H2O(keep=0.4), h2o_rule),
    "h2o_tokens": (H2O(keep=9, num_sink=2, recent_share=0.3), h2o_rule),
    "h2o_grows_first": (H2O(keep=30, num_sink=0), h2o_rule),
    "h2o_tiny": (H2O(keep=2), h2o_rule),
    "streaming": (StreamingLLM(keep=0.4), streaming_rule),
    "streaming_grows_first": (StreamingLLM(keep=29, num_sink=2), streaming_rule),
}


@pytest.mark.parametrize("prompt_name", PROMPTS)
@pytest.mark.parametrize("name", LIMITED)
def test_methods_with_a_limit_equal_the_loops(name: str, prompt_name: str) -> None:
    policy, make_rule = LIMITED[name]

    def rules_of(run: Run, b: int, kept: list[list[list[int]]]) -> Any:
        tokens = policy.keep if isinstance(policy.keep, int) else 0
        return [[make_rule(policy, max(tokens, len(own))) for own in lists] for lists in kept]

    run = assert_equal_loops(policy, PROMPTS[prompt_name], rules_of)
    if "grows_first" not in name:
        assert all(isinstance(slots.grown, int) for slots in run.layers)


@pytest.mark.parametrize("keep", [0.3, 0.6])
@pytest.mark.parametrize("prompt_name", PROMPTS)
def test_tgv_as_released_equals_the_loops(prompt_name: str, keep: float) -> None:
    policy = TGVKV(keep=keep, decode="released")
    rows = PROMPTS[prompt_name]

    def rules_of(run: Run, b: int, kept: list[list[list[int]]]) -> Any:
        row = rows[b].replace(".", "")
        masses = [float(layer.mass[b]) for layer in run.scores if layer.mass is not None]
        text_from = max(row.rfind("i"), row.rfind("v")) + 1
        return [
            [
                tgv_rule(
                    policy,
                    NUM_LAYERS * keep * mass / sum(masses),
                    max(1, sum(c >= text_from for c in own)),
                )
                for own in lists
            ]
            for mass, lists in zip(masses, kept, strict=True)
        ]

    assert_equal_loops(policy, rows, rules_of)


def test_tgv_worked_example() -> None:
    """Attention that grows with the slot: the oldest key of the region goes."""
    prompt = make_prompt("tiiiittt")
    policy = TGVKV(keep=0.5, num_sink=1, decode="released")
    kept = [[0, 2, 5, 6, 7], [0, 6, 7]]
    scores = [
        LayerScores(torch.zeros(1, 1, 8), prompt, mass=torch.tensor([mass]))
        for mass in (1.45, 0.95)
    ]
    assert policy.budgets(scores).tolist() == [[5], [3]]
    selections = [
        Selection(torch.tensor([[own]], dtype=torch.int32), torch.tensor([[len(own)]]).int())
        for own in kept
    ]
    blocks = [block_of(prompt, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)) for _ in kept]
    for block in blocks:
        block.track(torch.zeros(1, 1, 8))
    layers = [store.slots for store in select_slots(blocks, selections)]
    policy.begin_decoding(layers, scores)
    row = torch.zeros(1, 1, 1, 8)
    for _ in range(4):
        for slots in layers:
            slots.append(row, row)
            slots.scores.copy_(slots.positions)
        evict_layers(layers, policy.evict_step(layers))
    assert live_columns(layers) == [[[[0, 5, 6, 7, 8, 9, 10, 11]]], [[[0, 8, 9, 10, 11]]]]


@pytest.mark.parametrize(
    "policy",
    [
        H2O(keep=1.0),
        H2O(keep=0.2, decode="append"),
        H2O(keep=0.2, num_sink=0, recent_share=0, normalize=True),
        StreamingLLM(keep=1.5),
        StreamingLLM(keep=0.2, decode="append"),
        TGVKV(keep=0.2),
        D2O(keep=0.2, decode="append"),
        KeepKV(keep=0.2, decode="append"),
        ZSMerge(keep=1.0),
    ],
    ids=str,
)
def test_policies_that_only_append(policy: Any) -> None:
    assert isinstance(policy, DecodePolicy)
    assert not policy.evicts_while_decoding


def test_tgv_leaves_alone_what_the_prompt_left_whole() -> None:
    """A sequence of text, beside one with an image."""
    policy = TGVKV(keep=0.3, decode="released")
    prompt = make_prompt("tttttttttttttttttttttttt", "ttttiiiiiiiiiiiitttttttt")
    tokens = Tokens.draw(2, 24 + NUM_STEPS, NUM_LAYERS)
    run = decode(policy, prompt, tokens, NUM_STEPS)
    for layer in run.live[-1]:
        assert layer[0] == [list(range(24 + NUM_STEPS))]
        assert len(layer[1][0]) < 24


@pytest.mark.parametrize("policy", [H2O(keep=0.4), TGVKV(keep=0.4, decode="released")], ids=str)
def test_a_later_turn_is_several_steps_at_once(policy: Any) -> None:
    rows = PROMPTS["left_padded"]
    assert_a_turn_is_several_steps(policy, rows, num_before=5, num_steps=15)


def test_a_step_neither_reads_nor_leaves_the_device() -> None:
    """On tensors that hold no data: lists that evict alike, and lists counted on the device."""
    bins = [HAE(kappa=1.0, alpha=1.0, bin_len=n, num_recent=2, vision_first=True) for n in (1, 3)]
    limited = [policy for policy, _ in LIMITED.values()]
    merging = [KeepKV(keep=0.4, window=4), ZSMerge(keep=0.4), D2O(keep=0.4)]
    for policy in (*limited, *bins, *merging, TGVKV(keep=0.4, decode="released")):
        rows = PROMPTS["left_padded"]
        prompt = make_prompt(*rows)
        tokens = Tokens.draw(3, prompt.kv_len + 6, NUM_LAYERS)
        layers = decode(policy, prompt, tokens, 2).layers
        for slots in layers:
            slots._each(lambda block: block.to("meta"))
            slots.padding_lens = slots.padding_lens.to("meta")
            for name, value in slots.memory.items():
                if isinstance(value, torch.Tensor):
                    slots.memory[name] = value.to("meta")
            if isinstance(slots.grown, torch.Tensor):
                slots.grown = slots.grown.to("meta")
        for _ in range(4):
            for i, slots in enumerate(layers):
                q, k, v = (ts[i][:, :, -1:].to("meta") for ts in vars(tokens).values())
                slots.append(k, v)
                policy.observe_step(slots, q, key_mask=slots.visible(None))
            evict_layers(layers, policy.evict_step(layers))
        assert all(slots.keys.is_meta and slots.scores.is_meta for slots in layers)
