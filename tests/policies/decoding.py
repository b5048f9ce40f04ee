"""A small engine that decodes on tensors, and the same as loops over Python lists in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvevict.policies import (
    H2O,
    HAE,
    LayerScores,
    PrefillPolicy,
    Prompt,
    StreamingLLM,
    merge_layers,
    select_layers,
)
from kvevict.policies.base import observer
from kvevict.policies.decode import begin_decoding
from kvevict.slots import Slots, evict_layers, select_slots
from tests.policies.cases import NUM_KV_HEADS, NUM_QO_HEADS, make_prompt

HEAD_DIM, NUM_STEPS, NUM_LAYERS = 8, 24, 2
Live = list[list[list[list[int]]]]  # [layer][sequence][list] -> ascending columns


@dataclass(eq=False)
class Tokens:
    """Random queries, keys and values of a prompt and of the steps after it, per layer."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def draw(cls, batch_size: int, num_columns: int, num_layers: int) -> Tokens:
        def states(num_heads: int, scale: float) -> list[Tensor]:
            shape = (batch_size, num_heads, num_columns, HEAD_DIM)
            return [scale * torch.randn(shape) for _ in range(num_layers)]

        return cls(states(NUM_QO_HEADS, 3), states(NUM_KV_HEADS, 1), states(NUM_KV_HEADS, 1))

    def of_sequence(self, b: int, first: int) -> Tokens:
        """Return one sequence without its left padding."""
        parts = ([t[b : b + 1, :, first:] for t in ts] for ts in vars(self).values())
        return Tokens(*parts)


@dataclass(eq=False)
class Run:
    """What an engine did: live columns after the prompt and after every step."""

    live: list[Live]
    layers: list[Slots]
    scores: list[LayerScores] = field(default_factory=list)


def decode(
    policy: Any,
    prompt: Prompt,
    tokens: Tokens,
    num_steps: int,
    turn: tuple[int, int, Tensor] | None = None,
) -> Run:
    """Evict the prompt and decode; `turn` makes step i one of n tokens with this mask."""
    batch_size, prompt_len = prompt.modality.shape
    first = [[t[:, :, :prompt_len] for t in ts] for ts in vars(tokens).values()]
    if isinstance(policy, PrefillPolicy):
        rows = policy.row_index(prompt)
        scores: list[LayerScores] = []
        for states in zip(*first, strict=True):
            scores.append(observer(policy, next(iter(scores), None))(*states, prompt, rows))
        selections = select_layers(policy, scores)
    else:
        zeros = torch.zeros(batch_size, 1, prompt_len)
        scores = [LayerScores(zeros, prompt) for _ in first[0]]
        selections = None
    if selections is not None:
        first[1:] = [[tensor.clone() for tensor in tensors] for tensors in first[1:]]
        scores, selections = merge_layers(policy, first[1], first[2], scores, selections)
    blocks = []
    for k, v, layer in zip(first[1], first[2], scores, strict=True):
        blocks.append(block_of(prompt, k, v))
        blocks[-1].track(layer.scores)
    layers = blocks
    if selections is not None:
        layers = [store.slots for store in select_slots(blocks, selections, split=False)]
    assert policy.evicts_while_decoding
    begin_decoding(policy, layers, scores)
    live = [live_columns(layers)]
    end = prompt_len
    for step in range(num_steps):
        count, mask = turn[1:] if turn and turn[0] == step else (1, None)
        begin, end = end, end + count
        for i, slots in enumerate(layers):
            q, k, v = (ts[i][:, :, begin:end] for ts in vars(tokens).values())
            slots.append(k, v)
            policy.observe_step(slots, q, key_mask=slots.visible(mask))
        if count > 1:
            for slots in layers:
                slots.note_turn(torch.zeros(batch_size, count), mask)
        evict_layers(layers, policy.evict_step(layers))
        live.append(live_columns(layers))
    return Run(live, layers, scores)


def block_of(prompt: Prompt, keys: Tensor, values: Tensor) -> Slots:
    """Return all keys of a prompt, left-padded or not."""
    column = torch.arange(prompt.kv_len).expand_as(prompt.modality)
    padding = prompt.kv_len - prompt.lens
    tags = torch.stack([column, column - padding[:, None], prompt.modality], -1).int()
    return Slots(
        keys,
        values,
        tags.masked_fill(~prompt.valid[..., None], -1)[:, None],
        seen_len=prompt.kv_len,
        padding_lens=padding.int(),
        has_empty=prompt.key_mask is not None,
    )


def live_columns(layers: list[Slots]) -> Live:
    """Return what every list holds."""
    return [
        [[sorted(c for c in own if c >= 0) for own in lists] for lists in slots.columns.tolist()]
        for slots in layers
    ]


# Loops


@dataclass
class List:
    """One list: its live columns in order, and their scores."""

    live: list[int]
    scores: dict[int, float]
    row: str

    def is_text(self, column: int) -> bool:
        return column >= len(self.row) or self.row[column] not in "iv"

    def add(self, attention: dict[int, float]) -> None:
        for column, value in attention.items():
            self.scores[column] = self.scores.get(column, 0.0) + value

    def drop(self, columns: list[int]) -> None:
        self.live = [c for c in self.live if c not in columns]


Rule = Callable[[List, dict[int, float], int], None]
"""Changes a list after a step, given the attention to its keys and the tokens seen so far."""


def decode_by_loops(
    tokens: Tokens,
    row: str,
    kept: list[list[list[int]]],
    starts: Any,
    rules: Any,
    num_steps: int,
) -> list[list[list[list[int]]]]:
    """Decode one sequence without padding.

    Args:
        tokens: of the sequence.
        row: a letter per token of the prompt.
        kept: [layer][list] the columns that stay of the prompt.
        starts: [layer][list] tensors [prompt length], the scores that the keys start with.
        rules: [layer][list] a `Rule` each.
        num_steps: tokens to decode.

    Returns:
        [step][layer][list] live columns.
    """
    states = [
        [
            List(list(own), {c: float(start[c]) for c in own}, row)
            for own, start in zip(lists, layer_starts, strict=True)
        ]
        for lists, layer_starts in zip(kept, starts, strict=True)
    ]
    history = []
    for column in range(len(row), len(row) + num_steps):
        for layer, lists in enumerate(states):
            for i, own in enumerate(lists):
                own.live.append(column)
                attention = attention_of(tokens, layer, column, own.live, i, len(lists))
                rules[layer][i](own, attention, column + 1)
        history.append([[list(own.live) for own in lists] for lists in states])
    return history


def attention_of(
    tokens: Tokens, layer: int, row: int, columns: list[int], which: int, num_lists: int
) -> dict[int, float]:
    """Return the attention of a row to some columns, the mean over the heads of a list."""
    heads = NUM_QO_HEADS // num_lists
    total = torch.zeros(len(columns), dtype=torch.float64)
    for head in range(which * heads, (which + 1) * heads):
        key = tokens.keys[layer][0, head * NUM_KV_HEADS // NUM_QO_HEADS, columns].double()
        logits = key @ tokens.queries[layer][0, head, row].double() / key.shape[-1] ** 0.5
        total += logits.softmax(-1)
    return dict(zip(columns, (total / heads).tolist(), strict=True))


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


def bin_rule(policy: HAE, limit: int) -> Rule:
    """Delete the lowest sums once the bin is full."""
    num_sink = min(policy.num_sink, limit)
    num_recent = min(policy.num_recent, limit - num_sink)

    def rule(own: List, attention: dict[int, float], seen: int) -> None:
        own.scores = {c: s * policy.decay for c, s in own.scores.items()}
        own.add(attention)
        if len(own.live) >= limit + policy.bin_len:
            middle = [c for c in own.live if num_sink <= c < seen - num_recent]
            is_text = own.is_text
            middle.sort(key=lambda c: (policy.vision_first and is_text(c), own.scores[c]))
            own.drop(middle[: len(own.live) - limit])

    return rule


def assert_equal_loops(
    policy: Any, rows: list[str], rules_of: Callable[[Run, int, list[list[list[int]]]], Any]
) -> Run:
    """Decode a batch, and every sequence alone by loops.

    `rules_of` gives the rules of a sequence, from what it kept of the prompt.
    """
    prompt = make_prompt(*rows)
    tokens = Tokens.draw(len(rows), prompt.kv_len + NUM_STEPS, NUM_LAYERS)
    run = decode(policy, prompt, tokens, NUM_STEPS)
    for b, row in enumerate(rows):
        padding = row.count(".")
        kept = [[[c - padding for c in own] for own in layer[b]] for layer in run.live[0]]
        expected = decode_by_loops(
            tokens.of_sequence(b, padding),
            row[padding:],
            kept,
            [layer.scores[b, :, padding:] for layer in run.scores],
            rules_of(run, b, kept),
            NUM_STEPS,
        )
        for step, theirs in enumerate(expected, 1):
            ours = [[[c - padding for c in own] for own in layer[b]] for layer in run.live[step]]
            assert ours == theirs, f"step {step} of sequence {b}"
    return run


def assert_a_turn_is_several_steps(
    policy: Any, rows: Sequence[str], *, num_before: int, num_steps: int
) -> None:
    """A turn of 8 columns with padding gives what each sequence gives alone.

    Args:
        policy: what evicts.
        rows: three prompts, padded on the left.
        num_before: steps before the turn.
        num_steps: of them all, the turn being one.
    """
    prompt = make_prompt(*rows)
    num_columns = prompt.kv_len + num_steps + 7
    tokens = Tokens.draw(3, num_columns, NUM_LAYERS)
    padding, begin = [0, 4, 7], prompt.kv_len + num_before
    mask = torch.ones(3, begin + 8, dtype=torch.bool)
    for b, row in enumerate(rows):
        mask[b, : row.count(".")] = False
        mask[b, begin : begin + padding[b]] = False
    together = decode(policy, prompt, tokens, num_steps, turn=(num_before, 8, mask))
    for b, row in enumerate(rows):
        first, count = row.count("."), 8 - padding[b]
        real = [*mask[b].nonzero().flatten().tolist(), *range(mask.shape[1], num_columns)]
        alone = Tokens(*([t[b : b + 1, :, real] for t in ts] for ts in vars(tokens).values()))
        visible = torch.ones(1, len(row) - first + num_before + count, dtype=torch.bool)
        turn = (num_before, count, visible)
        single = decode(policy, make_prompt(row.replace(".", "")), alone, num_steps, turn=turn)
        for ours, theirs in zip(together.live, single.live, strict=True):
            for layer, expected in zip(ours, theirs, strict=True):
                assert layer[b] == [[real[c] for c in own] for own in expected[0]]
