"""Methods that merge while decoding, against loops over Python dicts in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict.policies import D2O, KeepKV, Prompt, ZSMerge
from kvevict.slots import Slots
from tests.policies.cases import NUM_KV_HEADS, NUM_QO_HEADS, PROMPTS, make_prompt
from tests.policies.decoding import NUM_LAYERS, Tokens, assert_a_turn_is_several_steps, decode
from tests.policies.merge_oracles import cosine, dot

NUM_STEPS = 12
GROUP_SIZE = NUM_QO_HEADS // NUM_KV_HEADS


@dataclass(eq=False)
class Token:
    """A key that is stored."""

    key: Tensor
    value: Tensor
    weight: float
    score: float


class Head:
    """What a KV head of a sequence stores: tokens by their column."""

    def __init__(self, slots: Slots, b: int, head: int) -> None:
        """Read it from what the prompt's eviction left."""
        self.tokens: dict[int, Token] = {}
        self.limit = int(slots.lens[b, head])
        weights = torch.ones_like(slots.scores) if slots.key_weight is None else slots.key_weight
        for slot, column in enumerate(slots.columns[b, head].tolist()):
            if column >= 0:
                self.tokens[column] = Token(
                    slots.keys[b, head, slot].double(),
                    slots.values[b, head, slot].double(),
                    float(weights[b, head, slot]),
                    float(slots.scores[b, head, slot]),
                )
        memory = {name: value for name, value in slots.memory.items() if name != "limit"}
        self.memory: dict[str, Any] = {
            name: value[b, head].double()
            for name, value in memory.items()
            if isinstance(value, Tensor) and value.dim() >= 2 and name in ("query", "threshold")
        }

    def attention(self, rows: Tensor) -> dict[int, float]:
        """Return what the keys get from a row, the mean over the heads of the group."""
        keys = torch.stack([t.key for t in self.tokens.values()])
        bias = torch.tensor([t.weight for t in self.tokens.values()]).double().log()
        logits = rows.double() @ keys.mT / keys.shape[1] ** 0.5 + bias
        return dict(zip(self.tokens, logits.softmax(-1).mean(0).tolist(), strict=True))

    def lowest(self, candidates: list[int]) -> int:
        return min(candidates, key=lambda c: (self.tokens[c].score, c))

    def nearest(self, gone: int, targets: list[int], similar: Callable[..., float]) -> int:
        key = self.tokens[gone].key
        return max(targets, key=lambda c: similar(key, self.tokens[c].key))


def zsmerge_step(policy: ZSMerge, own: Head, rows: Tensor, seen: int, first: int) -> None:
    for token in own.tokens.values():
        token.score *= policy.decay
    for column, value in own.attention(rows).items():
        own.tokens[column].score += value
    if len(own.tokens) <= own.limit:
        return
    num_residual = min(policy.num_residual, own.limit // 2)
    for_itself = own.limit - num_residual
    tail = max(2, math.floor(own.limit * policy.tail_share + 1e-6))
    tail = min(tail, (for_itself + 1) // 2)
    sinks = min(policy.num_sink, for_itself - tail)
    recent = min(tail + 1, for_itself - sinks)
    residual = [c for c, token in own.tokens.items() if token.score == math.inf]
    middle = [c for c in own.tokens if first + sinks <= c < seen - recent and c not in residual]
    gone = own.lowest(middle)
    old, target = own.tokens[gone], own.tokens[own.nearest(gone, residual, dot)]
    weight = old.weight + target.weight
    target.key = (old.weight * old.key + target.weight * target.key) / weight
    target.value = (old.weight * old.value + target.weight * target.value) / weight
    target.weight = weight
    del own.tokens[gone]


def keepkv_step(policy: KeepKV, own: Head, rows: Tensor, seen: int, first: int) -> None:
    for column, value in own.attention(rows).items():
        own.tokens[column].score = policy.decay * own.tokens[column].score + value
    query = rows.double().mean(0) / rows.shape[1] ** 0.5
    own.memory["query"] = policy.decay * own.memory["query"] + (1 - policy.decay) * query
    if len(own.tokens) <= own.limit:
        return
    recent = min(policy.window, (own.limit + 1) // 2)
    sinks = min(policy.num_sink, own.limit - recent)
    gone = own.lowest([c for c in own.tokens if first + sinks <= c < seen - recent])
    best = own.nearest(gone, [c for c in own.tokens if c != gone], cosine)
    old, target = own.tokens.pop(gone), own.tokens[best]
    if cosine(old.key, target.key) < policy.similarity:
        return
    pair = (target, old)
    logits = [float(t.key @ own.memory["query"]) for t in pair]
    e = [t.weight * math.exp(s) for t, s in zip(pair, logits, strict=True)]
    key = (e[0] * target.key + e[1] * old.key) / sum(e)
    target.value = (e[0] * target.value + e[1] * old.value) / sum(e)
    votes = target.weight + old.weight
    wanted, mean = math.log(sum(e) / votes), float(key @ own.memory["query"])
    is_safe = 0.5 <= wanted / mean <= 2
    target.key = key * (wanted / mean) if is_safe else key
    target.weight = votes if is_safe else sum(e) / math.exp(mean)


def d2o_step(policy: D2O, own: Head, rows: Tensor, seen: int, first: int) -> None:
    for column, value in own.attention(rows).items():
        own.tokens[column].score += value
    if len(own.tokens) <= own.limit:
        return
    recent = math.floor(own.limit * policy.recent_share + 1e-6)
    sinks = min(policy.num_sink, own.limit - recent)
    gone = own.lowest([c for c in own.tokens if first + sinks <= c < seen - recent])
    best = own.nearest(gone, [c for c in own.tokens if c != gone], cosine)
    old, target = own.tokens.pop(gone), own.tokens[best]
    similarity, threshold = cosine(old.key, target.key), float(own.memory["threshold"])
    new = similarity if math.isnan(threshold) else (threshold + similarity) / 2
    own.memory["threshold"] = new
    if similarity < new - 1e-12:
        return
    weights = (0.5, similarity / 2)
    if policy.merging == "exponential":
        weights = (math.e, math.exp(similarity))
        weights = (weights[0] / sum(weights), weights[1] / sum(weights))
    target.key = weights[0] * target.key + weights[1] * old.key
    target.value = weights[0] * target.value + weights[1] * old.value


CASES: dict[str, tuple[Any, Any]] = {
    "zsmerge": (ZSMerge(keep=0.4), zsmerge_step),
    "zsmerge_several": (ZSMerge(keep=11, num_sink=1, num_residual=3, decay=0.8), zsmerge_step),
    "zsmerge_grows_first": (ZSMerge(keep=30, num_residual=2, num_sink=0), zsmerge_step),
    "keepkv": (KeepKV(keep=0.4, window=4, similarity=0.2), keepkv_step),
    "keepkv_grows_first": (KeepKV(keep=30, window=6, similarity=-1.0), keepkv_step),
    "d2o": (D2O(keep=0.4), d2o_step),
    "d2o_exponential": (D2O(keep=12, num_sink=1, merging="exponential"), d2o_step),
    "d2o_grows_first": (D2O(keep=30), d2o_step),
}


def begin(policy: Any, prompt: Prompt, tokens: Tokens) -> list[Slots]:
    """Return what is stored after the prompt."""
    return decode(policy, prompt, tokens, 0).layers


@pytest.mark.parametrize("prompt_name", ["one_image", "left_padded"])
@pytest.mark.parametrize("case", CASES)
def test_merging_while_decoding_equals_the_loops(case: str, prompt_name: str) -> None:
    policy, step = CASES[case]
    rows = PROMPTS[prompt_name]
    prompt = make_prompt(*rows)
    length = prompt.kv_len
    tokens = Tokens.draw(len(rows), length + NUM_STEPS, NUM_LAYERS)
    # Several numbers of steps: merged keys show up in the attention of later ones.
    runs = {n: decode(policy, prompt, tokens, n).layers for n in (4, NUM_STEPS)}
    merged = 0
    for i, start in enumerate(begin(policy, prompt, tokens)):
        for b, row in enumerate(rows):
            for head in range(NUM_KV_HEADS):
                own = Head(start, b, head)
                if isinstance(policy.keep, int):
                    own.limit = max(own.limit, policy.keep)
                for n in range(NUM_STEPS):
                    column = length + n
                    own.tokens[column] = Token(
                        tokens.keys[i][b, head, column].double(),
                        tokens.values[i][b, head, column].double(),
                        1.0,
                        0.0,
                    )
                    heads = slice(head * GROUP_SIZE, (head + 1) * GROUP_SIZE)
                    query = tokens.queries[i][b, heads, column]
                    step(policy, own, query, column + 1, row.count("."))
                    if n + 1 in runs:
                        merged += compare(own, runs[n + 1][i], b, head)
    assert merged > 0


def compare(own: Head, slots: Slots, b: int, head: int) -> int:
    """Compare what is stored; return how many of the keys stand for several."""
    columns = slots.columns[b, head].tolist()
    assert sorted(c for c in columns if c >= 0) == sorted(own.tokens)
    for slot, column in enumerate(columns):
        if column < 0:
            continue
        token = own.tokens[column]
        pairs = [(slots.keys, token.key), (slots.values, token.value)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[b, head, slot].double(), theirs, rtol=1e-4, atol=1e-4)
        if slots.key_weight is not None:
            weight = float(slots.key_weight[b, head, slot])
            assert weight == pytest.approx(token.weight, rel=1e-4)
    return sum(token.weight != 1 for token in own.tokens.values()) + (slots.key_weight is None)


@pytest.mark.parametrize("keep", [0.4, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("num_residual", [1, 4])
def test_zsmerge_loses_no_token(num_residual: int, keep: float) -> None:
    """Weights sum up to the tokens seen, whatever the lengths; one of each list is a residual."""
    policy = ZSMerge(keep=keep, num_residual=num_residual)
    for rows in (PROMPTS["left_padded"], ["t"], ["..t", "ttt"]):
        prompt = make_prompt(*rows)
        tokens = Tokens.draw(len(rows), prompt.kv_len + NUM_STEPS, 1)
        (slots,) = decode(policy, prompt, tokens, NUM_STEPS).layers
        live = slots.columns >= 0
        assert slots.key_weight is not None
        total = slots.key_weight.where(live, 0.0).sum(-1)
        expected = (prompt.lens + NUM_STEPS)[:, None].expand(-1, NUM_KV_HEADS).float()
        limit = slots.memory["limit"]
        # A list of one key has no room for a residual slot.
        has_room = torch.as_tensor(limit).expand_as(total) > 1
        assert torch.equal(total[has_room], expected[has_room])
        assert torch.equal((~slots.scores.isfinite() & live).any(-1), has_room)
        if isinstance(keep, int):
            assert (slots.lens <= keep).all()


@pytest.mark.parametrize("case", ["zsmerge_several", "keepkv", "d2o"])
def test_a_later_turn_is_several_steps_at_once(case: str) -> None:
    policy, _ = CASES[case]
    rows = PROMPTS["left_padded"]
    assert_a_turn_is_several_steps(policy, rows, num_before=3, num_steps=9)
