"""Rows taken out of the prompt between two layers, on tiny models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import kvevict
from kvevict.integrations.transformers import EvictedLayer
from kvevict.policies import HAE, LightKV, Prompt, Selection, Shortening, SnapKV
from tests.integrations.masked_reference import kept_mask, masked_reference
from tests.integrations.test_transformers import SECOND_TURN, state_of, two_turns
from tests.integrations.tiny_models import (
    LONG_ROW,
    MODELS,
    NUM_LAYERS,
    ONE_IMAGE,
    TEXT_CONFIG,
    TWO_IMAGES,
    VISION_MODELS,
    Row,
    generate,
    get_model,
    make_inputs,
    row_of,
)
from tests.policies.merging import merge_by_loops

BATCHES = {
    "single": [ONE_IMAGE],
    "left_padded": [ONE_IMAGE, TWO_IMAGES, LONG_ROW],
    "two_images": [TWO_IMAGES],
}
DROPPING = HAE(kappa=1.0, alpha=1.0, drop_hidden=True, decode="append")


def logits_of(output: Any) -> Tensor:
    """Return the logits of all steps [batch_size, num_new, vocab_size]."""
    return torch.stack(output.logits, 1)


class DropThirds:
    """Only a `LayerPolicy`: every third row goes behind layer 0, every other behind layer 1."""

    def __init__(self) -> None:
        self.lens: list[int] = []

    def shortening_layers(self, num_layers: int) -> tuple[int, ...]:
        return (0, 1)

    def shorten(
        self, hidden_states: Tensor, query: Tensor, key: Tensor, prompt: Prompt, **options: Any
    ) -> Shortening:
        every = 3 - options["stage"]
        self.lens.append(hidden_states.shape[1])
        assert query.shape[2] == key.shape[2] == prompt.kv_len == hidden_states.shape[1]
        kept = prompt.valid & ((prompt.rank_from_start % every != 1) | (prompt.rank_from_end == 0))
        lens = kept.sum(1, keepdim=True)
        column = torch.arange(prompt.kv_len).expand_as(kept)
        index = column.where(kept, prompt.kv_len).sort(1).values[:, : int(lens.max())]
        index = index.where(index < prompt.kv_len, -1)[:, None]
        ragged = bool((lens < lens.max()).any())
        return Shortening(Selection(index.int(), lens.int(), ragged=ragged))


def by_layer(eviction: Any, prompt_len: int) -> dict[int, Tensor]:
    """Return what each layer keeps [batch_size, 1, prompt_len] bool."""
    return {layer.layer_idx: kept_mask(layer.kept_indices, prompt_len) for layer in eviction.kept}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model_name", VISION_MODELS)
def test_removing_rows_equals_masking_their_columns(model_name: str, batch: str) -> None:
    """Rows keep their positions (M-RoPE, too), and visual features reach the right ones."""
    model = get_model(model_name)
    inputs = make_inputs(model, BATCHES[batch])
    prompt_len = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    with kvevict.evict(model, DROPPING) as eviction:
        actual = generate(model, inputs, num_new=6)
    kept = by_layer(eviction, prompt_len)
    assert all(torch.equal(kept[0], own) for own in kept.values())
    assert ((kept[0].sum(-1) < real.sum(1, keepdim=True)) & (kept[0].sum(-1) > 10)).all()
    with masked_reference(model, prompt_len, {0: kept[0]}) as reference:
        reference.hidden = {i: ~kept[i] for i in range(1, NUM_LAYERS)}
        expected = generate(model, inputs, num_new=6)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_name", MODELS)
def test_several_stages_of_a_policy_that_does_nothing_else(model_name: str) -> None:
    model, policy = get_model(model_name), DropThirds()
    inputs = make_inputs(model, BATCHES["left_padded"])
    prompt_len = inputs["input_ids"].shape[1]
    generate(model, inputs, num_new=1)  # transformers adds hooks of its own at the first call.
    before = state_of(model)
    seen: list[set[int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({args[0].shape[1], kwargs["position_embeddings"][0].shape[-2]})
        if kwargs.get("position_ids") is not None:
            seen[-1].add(kwargs["position_ids"].shape[-1])

    with kvevict.evict(model, policy) as eviction:
        hook = model.get_decoder().layers[2].register_forward_pre_hook(note, with_kwargs=True)
        actual = generate(model, inputs, num_new=6)
        hook.remove()
    assert state_of(model) == before
    assert seen[0] == {int(eviction.kept[2].kept_lens.max())}
    longest = int(inputs["attention_mask"].sum(1).max())
    assert policy.lens == [longest, longest - (longest + 1) // 3 + (longest % 3 == 2)]
    kept = by_layer(eviction, prompt_len)
    assert [int(kept[i].sum()) for i in range(3)] == sorted(
        [int(kept[i].sum()) for i in range(3)], reverse=True
    )
    assert torch.equal(kept[0][:, 0], inputs["attention_mask"].bool())
    with masked_reference(model, prompt_len) as reference:
        reference.hidden = {i: ~kept[i] for i in range(1, NUM_LAYERS)}
        expected = generate(model, inputs, num_new=6)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)


def test_a_padded_batch_equals_each_row_alone() -> None:
    model = get_model("qwen2_5_vl")
    rows = BATCHES["left_padded"]
    inputs = make_inputs(model, rows)
    policy = HAE(kappa=1.0, alpha=1.0, drop_hidden=True, bin_len=3, num_recent=4)
    with kvevict.evict(model, policy):
        batch = generate(model, inputs, num_new=10)
    for b in range(len(rows)):
        with kvevict.evict(model, policy):
            alone = generate(model, row_of(model, inputs, rows, b), num_new=10)
        torch.testing.assert_close(logits_of(batch)[b], logits_of(alone)[0], rtol=0, atol=1e-4)


def test_later_layers_never_hold_the_rows() -> None:
    """Neither keys nor hidden states; the output has all rows, those that went as they left."""
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    seen: list[int] = []

    class Spy(HAE):
        def observe_later(self, first: Any, query: Tensor, *args: Any, **options: Any) -> Any:
            seen.append(query.shape[2])
            return super().observe_later(first, query, *args, **options)

    with kvevict.evict(model, Spy(**vars(DROPPING))) as eviction, torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    report = eviction.report
    assert report is not None
    prompt_len = inputs["input_ids"].shape[1]
    num_kept = int(eviction.kept[0].kept_lens)
    assert seen == [num_kept] * (NUM_LAYERS - 1)
    row_bytes = 2 * 2 * 16 * 4
    assert report.bytes_before == (prompt_len + (NUM_LAYERS - 1) * num_kept) * row_bytes
    assert report.bytes_after == NUM_LAYERS * num_kept * row_bytes
    assert output.logits.shape[1] == prompt_len
    kept = by_layer(eviction, prompt_len)[0][0, 0]
    _, first, second, _ = output.hidden_states
    assert torch.equal(first[0, ~kept], second[0, ~kept])
    assert not torch.isclose(first[0, kept], second[0, kept]).all(-1).any()


def test_a_later_turn_is_left_whole() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, BATCHES["left_padded"])
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, DROPPING) as eviction:
        actual, cached = two_turns(model, inputs, "whole conversation", padding=3)
    assert all(isinstance(layer, EvictedLayer) for layer in cached.layers)
    kept = by_layer(eviction, prompt_len)
    assert SECOND_TURN.after == ()
    with masked_reference(model, prompt_len, {0: kept[0]}) as reference:
        reference.hidden = {i: ~kept[i] for i in range(1, NUM_LAYERS)}
        expected, _ = two_turns(model, inputs, "whole conversation", padding=3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_every_turn_prunes_anew() -> None:
    """The later turn evicts from the caches, and removes no rows."""
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    with kvevict.evict(model, DROPPING, every_turn=True) as eviction:
        two_turns(model, inputs, "whole conversation")
    first, second = eviction.reports
    for old, new in zip(first.kept, second.kept, strict=True):
        prompt = {*old.kept_indices[0, 0].tolist()}
        has = {*new.kept_indices[0, 0].tolist()}
        assert {c for c in has if c < inputs["input_ids"].shape[1]} < prompt
    assert second.bytes_after < second.bytes_before


def test_a_ratio_refers_to_the_whole_prompt_in_every_layer() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, BATCHES["left_padded"])
    policy = HAE(keep=0.5, alpha=0.0, drop_hidden=True, decode="append")
    with kvevict.evict(model, policy) as eviction:
        generate(model, inputs, num_new=1)
    expected = [int(n * 0.5) for n in inputs["attention_mask"].sum(1).tolist()]
    for layer in eviction.kept:
        assert layer.kept_lens[:, 0].tolist() == expected
        assert torch.equal(layer.kept_indices, eviction.kept[0].kept_indices)


def test_keeping_all_changes_nothing() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, BATCHES["left_padded"])
    expected = generate(model, inputs)
    policy = HAE(alpha=0.0, drop_hidden=True, decode="append")
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=5e-5)
    assert eviction.report is not None
    assert eviction.report.bytes_after == eviction.report.bytes_before


def test_bfloat16() -> None:
    model = copy.deepcopy(get_model("qwen3_vl")).bfloat16()
    inputs = make_inputs(model, BATCHES["left_padded"])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, DROPPING) as eviction:
        actual = generate(model, inputs, num_new=1)
    kept = by_layer(eviction, prompt_len)
    with masked_reference(model, prompt_len) as reference:
        reference.hidden = {i: ~kept[i] for i in range(1, NUM_LAYERS)}
        expected = generate(model, inputs, num_new=1)
    cosine = torch.cosine_similarity(logits_of(actual).float(), logits_of(expected).float(), dim=-1)
    assert (cosine > 0.99).all()


def test_refusals() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(
        **TEXT_CONFIG, use_sliding_window=True, sliding_window=16, layer_types=kinds
    )
    model = Qwen2ForCausalLM(config).eval()
    before = state_of(model)
    with (
        kvevict.evict(model, DropThirds()),
        pytest.raises(ValueError, match="sliding-window or linear attention cannot follow"),
    ):
        generate(model, make_inputs(model, [LONG_ROW]))
    assert state_of(model) == before
    model = copy.deepcopy(get_model("llama"))
    del model.model.rotary_emb
    with pytest.raises(ValueError, match="not a plain list of layers"):
        kvevict.evict(model, DropThirds()).__enter__()


# LightKV


@torch.no_grad()
def merge_and_run(
    model: Any, inputs: dict[str, Tensor], policy: LightKV, tokens: list[int]
) -> tuple[Tensor, list[int]]:
    """Run one sequence layer by layer, merging by loops; then some tokens on what was stored.

    Returns:
        The logits of the last prompt row and of the tokens, and the rows of every layer.
    """
    decoder, seen = model.get_decoder(), []
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    hidden, positions = seen[0]["inputs_embeds"], seen[0]["position_ids"]
    row = "".join("ti"[int(i == model.config.image_token_id)] for i in inputs["input_ids"][0])
    layers, logits, lens = decoder.layers, [], []
    if positions is None:
        positions = torch.arange(len(row))[None]

    def ramp(begin: int, count: int) -> Tensor:
        place = torch.arange(begin, begin + count)[None]
        return place.expand(3, -1, -1) if model.config.model_type != "llava" else place

    cached = DynamicCache(config=model.config)
    with masked_reference(model, len(row)) as reference:
        embeddings = decoder.rotary_emb(hidden, positions)
        for i, layer in enumerate(layers):
            lens.append(hidden.shape[1])
            hidden = layer(hidden, position_embeddings=embeddings, past_key_values=cached)
            if i in policy.merge_layers:
                query, key, _ = reference.recorded[i][-1]
                stage = policy.merge_layers.index(i)
                kept, merged = merge_by_loops(hidden[0], query[0], key[0], row, policy, stage)
                hidden = merged[kept].float()[None]
                row = "".join(row[j] for j in kept)
                if policy.restart_positions:
                    embeddings = decoder.rotary_emb(hidden, ramp(0, len(row)))
                else:
                    embeddings = tuple(t[..., kept, :] for t in embeddings)
        logits.append(model.lm_head(decoder.norm(hidden))[0, -1])
        # The model counts on from its largest position.
        following = int(positions.max()) + 1
        for step, token in enumerate(tokens):
            hidden = model.get_input_embeddings()(torch.tensor([[token]]))
            for i, layer in enumerate(layers):
                place = following + step
                if policy.decode_positions == "stored" and i > policy.merge_layers[0]:
                    place = lens[i] + step
                embeddings = decoder.rotary_emb(hidden, ramp(place, 1))
                hidden = layer(hidden, position_embeddings=embeddings, past_key_values=cached)
            logits.append(model.lm_head(decoder.norm(hidden))[0, -1])
    return torch.stack(logits), lens


LIGHTKV = {
    "released": LightKV((0, 1), (1,), (0.5,)),
    "uniform": LightKV((0,), (1,), (0.3,), guidance="uniform"),
    "positions_kept": LightKV((0, 1), (1,), (0.25, 0.5), restart_positions=False),
    "positions_follow": LightKV((0, 1), (1,), (0.5,), decode_positions="stored"),
}


@pytest.mark.parametrize("name", LIGHTKV)
@pytest.mark.parametrize("model_name", ["llava", "qwen2_5_vl"])
def test_merging_equals_a_run_layer_by_layer(model_name: str, name: str) -> None:
    model, policy = get_model(model_name), LIGHTKV[name]
    inputs = make_inputs(model, [TWO_IMAGES])
    with kvevict.evict(model, policy) as eviction, torch.no_grad():
        output = generate(model, inputs, num_new=6)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] : -1].tolist()
    expected, lens = merge_and_run(model, inputs, policy, tokens)
    torch.testing.assert_close(logits_of(output)[0], expected, rtol=0, atol=2e-4)
    assert [int(layer.kept_lens) for layer in eviction.kept] == lens
    assert lens[-1] < lens[0]


def test_merging_and_beam_search() -> None:
    """Beams take along how far their layers were moved down."""
    model, policy = get_model("llava"), LIGHTKV["positions_follow"]
    inputs = make_inputs(model, [ONE_IMAGE])
    with kvevict.evict(model, policy):
        beams = generate(model, inputs, num_new=5, num_beams=3, output_scores=True)
        output = generate(model, inputs, num_new=5, num_beams=1)
    prompt_len = inputs["input_ids"].shape[1]
    tokens = beams.sequences[0, prompt_len:].tolist()
    logits, _ = merge_and_run(model, inputs, policy, tokens[:-1])
    score = logits.log_softmax(-1)[range(5), tokens].mean()
    assert float(score) == pytest.approx(float(beams.sequences_scores[0]), abs=1e-4)
    assert output.sequences.shape == beams.sequences.shape


@pytest.mark.parametrize("name", LIGHTKV)
@pytest.mark.parametrize("model_name", VISION_MODELS)
def test_merging_a_padded_batch(model_name: str, name: str) -> None:
    """One and two images, and a sequence without any, which keeps its positions."""
    model, policy = get_model(model_name), LIGHTKV[name]
    rows = [*BATCHES["left_padded"], Row(31, ())]
    inputs = make_inputs(model, rows)
    with kvevict.evict(model, policy):
        batch = generate(model, inputs, num_new=6)
    for b in range(len(rows)):
        alone_inputs = row_of(model, inputs, rows, b)
        if b == 3:
            text_only = alone_inputs.keys() - {"pixel_values", "image_grid_thw"}
            alone_inputs = {key: alone_inputs[key] for key in text_only}
        with kvevict.evict(model, policy):
            alone = generate(model, alone_inputs, num_new=6)
        torch.testing.assert_close(logits_of(batch)[b], logits_of(alone)[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("model_name", VISION_MODELS)
def test_merging_in_bfloat16(model_name: str) -> None:
    model = copy.deepcopy(get_model(model_name)).bfloat16()
    inputs = make_inputs(model, BATCHES["left_padded"])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with kvevict.evict(model, LIGHTKV["positions_follow"]) as eviction:
        output = generate(model, inputs, num_new=4)
    assert torch.isfinite(logits_of(output)).all()
    lens = [layer.kept_lens[:, 0].tolist() for layer in eviction.kept]
    assert lens == [[33, 50, 58], [25, 34, 42], [21, 26, 34]]


def test_merging_leaves_text_alone() -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [LONG_ROW])
    expected = generate(model, inputs)
    with kvevict.evict(model, LIGHTKV["released"]):
        actual = generate(model, inputs)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("model_name", ["llava", "qwen2_5_vl"])
def test_a_turn_after_merging(model_name: str) -> None:
    """Its tokens see the whole image, though later layers hold a part of it."""
    model, policy = get_model(model_name), LIGHTKV["positions_kept"]
    inputs = make_inputs(model, [TWO_IMAGES])
    with kvevict.evict(model, policy), torch.no_grad():
        first = generate(model, inputs, num_new=3)
        tokens = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
        again = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if "mm_token_type_ids" in inputs:
            zeros = torch.zeros(1, tokens.shape[1] - inputs["input_ids"].shape[1]).int()
            again["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], 1)
        second = generate(model, again, num_new=2, past_key_values=first.past_key_values)
    prompt_len = inputs["input_ids"].shape[1]
    fed = second.sequences[0, prompt_len:-1].tolist()
    expected, _ = merge_and_run(model, inputs, policy, fed)
    torch.testing.assert_close(logits_of(second)[0], expected[-2:], rtol=0, atol=2e-4)


def test_a_refused_policy_leaves_no_hook() -> None:
    model = get_model("llava")
    before = state_of(model)
    with pytest.raises(ValueError, match="merge_layers must be different layers below 3"):
        kvevict.evict(model, LightKV()).__enter__()
    assert state_of(model) == before


def test_merging_where_gradients_are_on() -> None:
    model, policy = get_model("llava"), LIGHTKV["released"]
    inputs = make_inputs(model, [ONE_IMAGE])
    with kvevict.evict(model, policy):
        actual = model(**inputs).logits
    with kvevict.evict(model, policy), torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(actual, expected)


def run_turns(model: Any, lens: list[int], *policies: Any, every_turn: bool = False) -> Tensor:
    """Feed an image and some turns of text; return the logits of the last turn."""
    inputs = make_inputs(model, [ONE_IMAGE])
    total, cache = inputs["input_ids"].shape[1], DynamicCache(config=model.config)
    with torch.no_grad():
        with kvevict.evict(model, policies[0], every_turn=every_turn):
            model(**inputs, past_key_values=cache)
        for length in lens:
            total += length
            with kvevict.evict(model, policies[-1], every_turn=every_turn):
                output = model(
                    input_ids=torch.arange(11, 11 + length)[None],
                    attention_mask=torch.ones(1, total),
                    past_key_values=cache,
                )
    logits: Tensor = output.logits
    return logits


def test_where_tokens_stand_outlives_an_eviction() -> None:
    model, policy = get_model("llava"), LIGHTKV["positions_follow"]
    expected = run_turns(model, [5, 1], policy)
    actual = run_turns(model, [5, 1], policy, every_turn=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="continue it under a policy that does so, not SnapKV"):
        run_turns(model, [5], policy, SnapKV(keep=1.0))
