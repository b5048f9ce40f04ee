"""Eviction while decoding, on tiny models: what is dropped, what is computed, what is stored."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvevict
from kvevict.integrations.transformers import EvictedLayer
from kvevict.policies import H2O, HAE, TGVKV, SnapKV, StreamingLLM, Victims
from kvevict.slots import MIN_SLACK, Slots
from tests.integrations.masked_reference import kept_mask, masked_reference
from tests.integrations.runs import assert_beams_stand_alone, find_reads_of_a_step
from tests.integrations.test_transformers import state_of
from tests.integrations.tiny_models import (
    LONG_ROW,
    MODELS,
    NUM_LAYERS,
    ONE_IMAGE,
    TWO_IMAGES,
    Row,
    generate,
    get_model,
    make_inputs,
    row_of,
)
from tests.policies.cases import make_prompt
from tests.policies.decoding import (
    Tokens,
    bin_rule,
    decode_by_loops,
    h2o_rule,
    streaming_rule,
)

BATCHES = {
    "single": [ONE_IMAGE],
    "left_padded": [ONE_IMAGE, TWO_IMAGES, LONG_ROW],
    "two_images": [TWO_IMAGES],
}
POLICIES: dict[str, Any] = {
    "h2o": H2O(keep=0.4),
    "h2o_tokens": H2O(keep=24, num_sink=2),
    "streaming_llm": StreamingLLM(keep=0.4),
    "tgv_kv": TGVKV(keep=0.4, decode="released"),
    "hae": HAE(kappa=1.0, alpha=1.0, bin_len=3, num_recent=6),
    "hae_one_list": HAE(kappa=1.0, alpha=1.0, bin_len=4, num_recent=6, scope="mean"),
}
NUM_NEW = 14


def watched(policy: Any) -> tuple[Any, list[list[Tensor]]]:
    """Return the same policy, and a list of what each step sees: [step][layer] columns."""
    seen: list[list[Tensor]] = []

    def evict_step(self: Any, layers: list[Slots]) -> Any:
        seen.append([slots.columns.clone() for slots in layers])
        victims = super(type(self), self).evict_step(layers)
        assert len(victims) == len(layers)
        return victims

    kind = type("Watched", (type(policy),), {"evict_step": evict_step})
    return kind(**vars(policy)), seen


def logits_of(output: Any) -> Tensor:
    """Return the logits of all steps [batch_size, num_new, vocab_size]."""
    return torch.stack(output.logits, 1)


def cases() -> Any:
    """Yield every policy with every model and every batch; all pairs, one after the other."""
    for i, policy in enumerate(POLICIES):
        for j, model in enumerate(MODELS):
            for k, batch in enumerate(BATCHES):
                marks = [] if k == (i + j) % len(BATCHES) else [pytest.mark.slow]
                yield pytest.param(policy, model, batch, marks=marks)


@pytest.mark.parametrize(("policy_name", "model_name", "batch"), cases())
def test_evicting_equals_masking(policy_name: str, model_name: str, batch: str) -> None:
    """Every step computes what a full cache does of which all but the live keys are masked."""
    model = get_model(model_name)
    inputs = make_inputs(model, BATCHES[batch])
    prompt_len = inputs["input_ids"].shape[1]
    policy, seen = watched(POLICIES[policy_name])
    with kvevict.evict(model, policy):
        actual = generate(model, inputs, num_new=NUM_NEW)
    assert len(seen) == NUM_NEW - 1
    with masked_reference(model, prompt_len) as reference:
        for layer in range(NUM_LAYERS):
            reference.live[layer] = [
                kept_mask(step[layer], prompt_len + 1 + i) for i, step in enumerate(seen)
            ]
        expected = generate(model, inputs, num_new=NUM_NEW)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)
    num_live = (seen[-1][0] >= 0).sum() / seen[-1][0].shape[1]
    total = inputs["attention_mask"].sum() + len(seen[-1][0]) * len(seen)
    assert (num_live < total) == (policy_name != "tgv_kv" or model_name != "llama")

    # The victims, by loops over the attention of that reference.
    for b in range(len(BATCHES[batch])):
        padding = int((inputs["attention_mask"][b] == 0).sum())
        tokens = tokens_of(reference, b, padding)
        first = [step[b] for step in seen[0]]
        kept = [
            [sorted(c - padding for c in own.tolist() if 0 <= c < prompt_len) for own in lists]
            for lists in first
        ]
        letters = "ti"
        image_id = getattr(model.config, "image_token_id", None)
        row = "".join(letters[int(i == image_id)] for i in inputs["input_ids"][b, padding:])
        rules = rules_of(POLICIES[policy_name], kept)
        if rules is None:
            continue
        starts = start_scores(POLICIES[policy_name], tokens, row)
        history = decode_by_loops(tokens, row, kept, starts, rules, NUM_NEW - 1)
        for step, theirs in zip(seen[1:], history, strict=False):
            # What a step sees is what the step before it left, and its own token.
            newest = int(step[0].max())
            ours = [
                [sorted(c - padding for c in own.tolist() if 0 <= c < newest) for own in lists[b]]
                for lists in step
            ]
            assert ours == theirs


def tokens_of(reference: Any, b: int, padding: int) -> Tokens:
    """Return the queries and keys of one sequence, prompt and steps, without its padding."""
    queries, keys, values = [], [], []
    for layer in range(NUM_LAYERS):
        ((prompt, *_),) = reference.recorded[layer]
        steps = reference.steps[layer]
        query = torch.cat([prompt, *(q for q, *_ in steps)], 2)
        _, key, value = steps[-1]
        for found, states in ((queries, query), (keys, key), (values, value)):
            found.append(states[b : b + 1, :, padding:])
    return Tokens(queries, keys, values)


def start_scores(policy: Any, tokens: Tokens, row: str) -> list[Tensor]:
    """Return what the kept keys start with, as the policy scores that prompt."""
    prompt = make_prompt(row)
    states = zip(tokens.queries, tokens.keys, tokens.values, strict=True)
    layers: list[Any] = []
    for layer in states:
        query, key, value = (t[:, :, : len(row)] for t in layer)
        if layers and isinstance(policy, HAE):
            own = policy.observe_later(layers[0], query, key, value, prompt, None)
        else:
            own = policy.observe(query, key, value, prompt, policy.row_index(prompt))
        layers.append(own)
    return [layer.scores[0] for layer in layers]


def rules_of(policy: Any, kept: list[list[list[int]]]) -> Any:
    """Return the rules of one sequence; None where they need more than what was kept."""
    if isinstance(policy, TGVKV) or (isinstance(policy, HAE) and policy.scope != "per_layer"):
        return None
    make = {H2O: h2o_rule, StreamingLLM: streaming_rule, HAE: bin_rule}[type(policy)]
    tokens = policy.keep if isinstance(policy.keep, int) else 0
    return [[make(policy, max(tokens, len(own))) for own in lists] for lists in kept]


@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_padded_batch_equals_each_row_alone(policy_name: str) -> None:
    model, policy = get_model("llava"), POLICIES[policy_name]
    rows = BATCHES["left_padded"]
    inputs = make_inputs(model, rows)
    with kvevict.evict(model, policy):
        batch = generate(model, inputs, num_new=NUM_NEW)
    for b in range(len(rows)):
        with kvevict.evict(model, policy):
            alone = generate(model, row_of(model, inputs, rows, b), num_new=NUM_NEW)
        torch.testing.assert_close(logits_of(batch)[b], logits_of(alone)[0], rtol=0, atol=1e-4)


def test_bfloat16() -> None:
    """The cache keeps its dtype and its length; sums stay float32."""
    model = copy.deepcopy(get_model("qwen2_5_vl")).bfloat16()
    inputs = make_inputs(model, BATCHES["left_padded"])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with kvevict.evict(model, H2O(keep=0.4)) as eviction:
        cache = generate(model, inputs, num_new=NUM_NEW).past_key_values
    for layer, kept in zip(cache.layers, eviction.kept, strict=True):
        assert layer.dtype == torch.bfloat16
        assert layer.store.slots.scores.dtype == torch.float32
        assert layer.store.slots.lens.tolist() == kept.kept_lens.tolist()


@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_step_reads_nothing_back(policy_name: str) -> None:
    """On a GPU a read would stall the queue; a padded batch, whatever its lists."""
    model = get_model("llava")
    inputs = make_inputs(model, BATCHES["left_padded"])
    assert find_reads_of_a_step(model, POLICIES[policy_name], inputs) == []


# Memory


def test_the_cache_stops_growing() -> None:
    """H2O holds `keep` tokens and HAE a bin more, however long the answer; real bytes."""
    model = get_model("llama")
    inputs = make_inputs(model, [LONG_ROW])
    row_bytes = 2 * 2 * 16 * 4
    for policy, most in ((H2O(keep=20), 21), (HAE(limit=20, bin_len=8, num_recent=4), 28)):
        with kvevict.evict(model, policy), torch.no_grad():
            cache = model(**inputs).past_key_values
            token = torch.tensor([[20]])
            peaks = set()
            for _ in range(150):
                model(input_ids=token, past_key_values=cache)
                peaks.add(max(layer.store.num_bytes for layer in cache.layers))
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 150
        assert all(layer.keys.shape[2] <= most for layer in cache.layers)
        if isinstance(policy, H2O):
            assert max(peaks) <= (most + MIN_SLACK) * row_bytes
        report = kvevict.report(cache)
        assert report.bytes_stored == sum(layer.store.num_bytes for layer in cache.layers)
        assert report.bytes_full == NUM_LAYERS * cache.get_seq_length() * row_bytes


def test_full_storages_are_freed() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    seen = []

    class Spy(H2O):
        def observe(self, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
            seen.extend([weakref.ref(key.untyped_storage()), weakref.ref(value.untyped_storage())])
            return super().observe(query, key, value, *a, **k)

    with kvevict.evict(model, Spy(keep=0.3)), torch.no_grad():
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)
    gc.collect()
    assert len(seen) == 2 * NUM_LAYERS
    assert all(ref() is None for ref in seen)


# Turns, contexts and other ways to decode


def converse(model: Any, inputs: dict[str, Tensor], turns: list[int]) -> tuple[Tensor, Any]:
    """Run a prompt and turns of so many tokens each; return the logits of the turns."""
    generator = torch.Generator().manual_seed(3)
    logits = []
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        mask = inputs["attention_mask"]
        for count in turns:
            ids = torch.randint(10, 90, (len(mask), count), generator=generator)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            extra = {}
            if "mm_token_type_ids" in inputs:
                extra["mm_token_type_ids"] = torch.zeros_like(ids)
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **extra)
            logits.append(output.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize("policy_name", POLICIES)
def test_turns_of_a_padded_batch(policy_name: str, every_turn: bool) -> None:
    """Steps, a question, steps: as each row alone."""
    model, policy = get_model("llava"), POLICIES[policy_name]
    rows = BATCHES["left_padded"]
    inputs = make_inputs(model, rows)
    turns = [1] * 6 + [7] + [1] * 6
    with kvevict.evict(model, policy, every_turn=every_turn) as eviction:
        together, _ = converse(model, inputs, turns)
    assert len(eviction.reports) == 1 + every_turn
    for b in range(len(rows)):
        alone_inputs = row_of(model, inputs, rows, b)
        generator = torch.Generator().manual_seed(3)
        # The same tokens as in the batch.
        ids = [torch.randint(10, 90, (len(rows), n), generator=generator)[b : b + 1] for n in turns]
        with kvevict.evict(model, policy, every_turn=every_turn), torch.no_grad():
            cache = model(**alone_inputs).past_key_values
            logits = [model(input_ids=i, past_key_values=cache).logits for i in ids]
        torch.testing.assert_close(together[b], torch.cat(logits, 1)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_beam_search(policy_name: str) -> None:
    """Beams take their lists, scores and counts along: each as a run of its own tokens."""
    model, policy = get_model("llava"), POLICIES[policy_name]
    inputs = make_inputs(model, [ONE_IMAGE])
    assert_beams_stand_alone(model, policy, inputs, num_new=8, num_beams=3)


def test_contexts_and_copies() -> None:
    """A new context of an equal policy goes on evicting; of another one it only appends."""
    model, policy = get_model("llava"), H2O(keep=0.3)
    inputs = make_inputs(model, [TWO_IMAGES])
    tokens = [torch.tensor([[i]]) for i in (20, 30, 40)]

    def step(cache: Any, token: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=token, past_key_values=cache).logits
        return logits

    with kvevict.evict(model, policy), torch.no_grad():
        cache = model(**inputs).past_key_values
        length = cache.layers[0].keys.shape[2]
        step(cache, tokens[0])
        copied, other = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = [step(cache, token) for token in tokens]
    with kvevict.evict(model, H2O(keep=0.3)):
        actual = [step(copied, token) for token in tokens]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert copied.layers[0].keys.shape[2] == length
    with kvevict.evict(model, SnapKV(keep=0.3)):
        for token in tokens:
            step(other, token)
    assert other.layers[0].keys.shape[2] == length + 3
    with kvevict.evict(model, policy):
        step(other, tokens[0])
    assert other.layers[0].keys.shape[2] == length + 4
    with pytest.raises(ValueError, match="only the 0 tokens"):
        cache.crop(-1)
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].keys.shape[0] == 2


def test_a_prompt_of_one_token() -> None:
    """Nothing of it can go, but the answer has a limit."""
    model = get_model("llama")
    inputs = {"input_ids": torch.tensor([[20]]), "attention_mask": torch.ones(1, 1).long()}
    for policy in (H2O(keep=9), StreamingLLM(keep=9), HAE(limit=9, bin_len=1, num_recent=4)):
        with kvevict.evict(model, policy) as eviction:
            cached = generate(model, inputs, num_new=20).past_key_values
        assert len(eviction.reports) == 1
        assert [layer.keys.shape[2] for layer in cached.layers] == [9] * NUM_LAYERS
        assert all((layer.store.slots.positions == 0).any() for layer in cached.layers)


def test_append_only_policies_keep_buckets() -> None:
    """TGV-KV as in the paper has decode methods, and no use for them."""
    model = get_model("llava")
    inputs = make_inputs(model, [Row(2, (3,)), LONG_ROW])
    with kvevict.evict(model, TGVKV(keep=0.3)):
        cache = generate(model, inputs, num_new=3).past_key_values
    layer = cache.layers[0]
    assert isinstance(layer, EvictedLayer)
    assert layer.decode_policy is None
    assert layer.store.members is not None


class DropNewest:
    """Only a `DecodePolicy`: nothing is scored, the newest key but one goes."""

    evicts_while_decoding = True

    def begin_decoding(self, layers: Any, scores: Any) -> None:
        assert all((layer.scores == 0).all() for layer in scores)

    def observe_step(self, slots: Slots, query: Tensor, **_: Any) -> None: ...

    def evict_step(self, layers: list[Slots]) -> list[Victims]:
        return [
            Victims(torch.full((len(slots.keys), 1, 1), slots.stored - 2, dtype=torch.int32))
            for slots in layers
        ]


def test_a_policy_that_only_decodes() -> None:
    model = get_model("qwen3_vl")
    inputs = make_inputs(model, BATCHES["left_padded"])
    before = state_of(model)
    with kvevict.evict(model, DropNewest()) as eviction:
        cache = generate(model, inputs, num_new=5).past_key_values
    prompt_len = inputs["input_ids"].shape[1]
    assert eviction.report is not None
    assert eviction.report.bytes_after == eviction.report.bytes_before
    for layer in cache.layers:
        columns = layer.store.slots.columns
        assert columns.shape == (3, 1, prompt_len)
        assert columns[:, 0, -1].tolist() == [prompt_len + 3] * 3
    assert state_of(model) == before


def test_a_turn_after_a_prompt_that_fits() -> None:
    """Scores per KV head make lists per head, though nothing was evicted before."""
    model, policy = get_model("llama"), H2O(keep=65)
    inputs = make_inputs(model, [LONG_ROW])
    total, cache = inputs["input_ids"].shape[1], DynamicCache(config=model.config)
    with kvevict.evict(model, policy, every_turn=True) as eviction, torch.no_grad():
        model(**inputs, past_key_values=cache)
        for length in [1] * 14 + [6]:
            total += length
            model(
                input_ids=torch.arange(11, 11 + length)[None],
                attention_mask=torch.ones(1, total),
                past_key_values=cache,
            )
    assert [layer.kept_lens.unique().tolist() for layer in eviction.kept] == [[65]] * NUM_LAYERS
