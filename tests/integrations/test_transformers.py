"""`kvevict.evict` on tiny random models: what is kept, what is computed, what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import kvevict
from kvevict.integrations import transformers as integration
from kvevict.integrations.transformers import EvictedLayer, Eviction, attention, context
from kvevict.policies import TGVKV, LayerScores, Policy, PrefillPolicy, Prompt, SnapKV
from kvevict.slots import COLUMN
from tests.integrations.masked_reference import kept_mask, masked_reference
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
from tests.policies import oracles

POLICIES: dict[str, PrefillPolicy] = {
    "tgv_kv": TGVKV(keep=0.3),
    "snapkv": SnapKV(keep=0.3, window=8),
}
BATCH = [ONE_IMAGE, TWO_IMAGES, LONG_ROW]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """Return one of the four models."""
    return get_model(request.param)


@pytest.fixture(params=VISION_MODELS)
def vision_model(request: pytest.FixtureRequest) -> Any:
    """Return one of the three vision-language models."""
    return get_model(request.param)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> PrefillPolicy:
    """Return one of the policies, at a budget that evicts."""
    return POLICIES[request.param]


def logits_of(output: Any) -> Tensor:
    """Return the logits of all steps [batch_size, num_new, vocab_size]."""
    return torch.stack(output.logits, 1)


def kept_masks(eviction: Eviction, prompt_len: int) -> dict[int, Tensor]:
    """Return what the last eviction kept, as `MaskedReference` wants it."""
    return {layer.layer_idx: kept_mask(layer.kept_indices, prompt_len) for layer in eviction.kept}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 5e-5) -> None:
    """Compare logits, whose standard deviation is about 2."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Keeping everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1.0, 10_000])
def test_keeping_all_is_the_unpatched_model(
    model: Any, keep: float | int, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(model).to(dtype)
    inputs = make_inputs(model, [TWO_IMAGES])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = generate(model, inputs)
    for policy in (TGVKV(keep=keep), SnapKV(keep=keep)):
        with kvevict.evict(model, policy) as eviction:
            actual = generate(model, inputs)
        assert torch.equal(logits_of(actual), logits_of(expected))
        assert torch.equal(actual.sequences, expected.sequences)
        assert eviction.report is not None
        assert eviction.report.bytes_after == eviction.report.bytes_before
        assert all(type(layer) is not EvictedLayer for layer in actual.past_key_values.layers)


def test_keeping_all_of_a_padded_batch(model: Any) -> None:
    inputs = make_inputs(model, BATCH)
    expected = generate(model, inputs)
    with kvevict.evict(model, TGVKV(keep=1.0)):
        actual = generate(model, inputs)
    assert_close(logits_of(actual), logits_of(expected))
    assert torch.equal(actual.sequences, expected.sequences)


# Evicting


def test_padded_batch_equals_each_row_alone(model: Any, policy: PrefillPolicy) -> None:
    inputs = make_inputs(model, BATCH)
    with kvevict.evict(model, policy) as eviction:
        batch = generate(model, inputs)
    together = eviction.kept
    for b in range(len(BATCH)):
        alone_inputs = row_of(model, inputs, BATCH, b)
        with kvevict.evict(model, policy) as eviction:
            alone = generate(model, alone_inputs)
        assert_close(logits_of(batch)[b], logits_of(alone)[0])
        padding = inputs["input_ids"].shape[1] - alone_inputs["input_ids"].shape[1]
        for one, many in zip(eviction.kept, together, strict=True):
            assert torch.equal(many.kept_lens[b], one.kept_lens[0])
            for own, shared in zip(one.kept_indices[0], many.kept_indices[b], strict=True):
                assert torch.equal(own + padding, shared[: len(own)])
                assert (shared[len(own) :] == -1).all()


def test_evicting_equals_masking(model: Any, policy: PrefillPolicy) -> None:
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs, num_new=10)
    with masked_reference(model, prompt_len, kept_masks(eviction, prompt_len)):
        expected = generate(model, inputs, num_new=10)
    assert_close(logits_of(actual), logits_of(expected))
    assert torch.equal(actual.sequences, expected.sequences)


def test_ragged_lists_without_padding(vision_model: Any) -> None:
    """Rows of one length and different budgets: holes in the cache, and no attention mask."""
    inputs = make_inputs(vision_model, [TWO_IMAGES, Row(9, (1, 8))])
    prompt_len = inputs["input_ids"].shape[1]
    assert inputs["attention_mask"].all()
    with kvevict.evict(vision_model, TGVKV(keep=0.4)) as eviction:
        actual = generate(vision_model, inputs)
    assert any(len(set(layer.kept_lens.flatten().tolist())) > 1 for layer in eviction.kept)
    with masked_reference(vision_model, prompt_len, kept_masks(eviction, prompt_len)):
        assert_close(logits_of(actual), logits_of(generate(vision_model, inputs)))


def test_the_policy_gets_the_scale_of_the_model() -> None:
    model = copy.deepcopy(get_model("llama"))
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    seen = []

    class Spy(SnapKV):
        def observe(self, *args: Any, sm_scale: float | None = None, **kwargs: Any) -> Any:
            seen.append(sm_scale)
            return super().observe(*args, sm_scale=sm_scale, **kwargs)

    with kvevict.evict(model, Spy(keep=0.5)):
        generate(model, make_inputs(model, [ONE_IMAGE]), num_new=1)
    assert seen == [0.5] * NUM_LAYERS


def test_budgets_and_kept_sets_equal_the_oracle(vision_model: Any) -> None:
    inputs = make_inputs(vision_model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with masked_reference(vision_model, prompt_len) as reference:
        generate(vision_model, inputs, num_new=1)
    policy = TGVKV(keep=0.3)
    with kvevict.evict(vision_model, policy) as eviction:
        generate(vision_model, inputs, num_new=1)
    is_image = inputs["input_ids"] == vision_model.config.image_token_id
    for b in range(len(BATCH)):
        expected = tgv_oracle(
            [reference.recorded[i][0][:2] for i in range(NUM_LAYERS)],
            b,
            inputs["attention_mask"][b].bool(),
            is_image[b],
            0.3,
        )
        for layer, kept in zip(eviction.kept, expected, strict=True):
            assert layer.kept_lens[b].tolist() == [len(kept)]
            assert layer.kept_indices[b, 0, : len(kept)].tolist() == kept


def tgv_oracle(
    layers: Sequence[tuple[Tensor, Tensor]], b: int, real: Tensor, is_image: Tensor, keep: float
) -> list[list[int]]:
    """Choose by materialized attention in float64, written from the formulas alone."""
    is_image = is_image[real]
    vision = is_image.nonzero().flatten()
    length = len(is_image)
    rows = torch.arange(int(vision[-1]) + 1, length)
    scores, mass = [], []
    for query, key in layers:
        q, k = query[b, :, real].double(), key[b, :, real].double()
        logits = q @ k.repeat_interleave(len(q) // len(k), 0).mT / q.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        attention = logits.masked_fill(future, -torch.inf).softmax(-1).mean(0)[rows]
        weight = attention[:, rows].sum(0) / torch.arange(len(rows), 0, -1)
        column_sum = attention.sum(0)
        scores.append(torch.where(is_image, weight @ attention, column_sum))
        mass.append(column_sum[vision].sum())
    first_real = int(real.nonzero()[0])
    kept = []
    for score, own in zip(scores, mass, strict=True):
        drop = max(0, round(float(length * (1 - len(layers) * keep * own / sum(mass)))))
        candidates = sorted(
            range(4, length - 1), key=lambda j: (bool(is_image[j]), -float(score[j]), j)
        )
        best = candidates[: max(0, len(candidates) - drop)]
        kept.append(sorted(first_real + j for j in [*range(4), *best, length - 1]))
    return kept


@dataclass(frozen=True)
class KeepText(Policy):
    """Keep every text token and no other."""

    keep: float | int = 1
    num_sink: int = 0

    def row_index(self, prompt: Prompt) -> None:
        return None

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        return LayerScores(torch.zeros(prompt.modality.shape)[:, None], prompt)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        return torch.stack([(x.prompt.valid & (x.prompt.modality == 0)).sum(1) for x in layers])

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        return (prompt.valid & (prompt.modality == 0)).to(torch.uint8)


def test_a_policy_of_ones_own_that_keeps_text_only(vision_model: Any) -> None:
    inputs = make_inputs(vision_model, BATCH)
    with kvevict.evict(vision_model, KeepText()) as eviction:
        actual = generate(vision_model, inputs)
    is_text = (inputs["input_ids"] != vision_model.config.image_token_id).logical_and(
        inputs["attention_mask"]
    )
    prompt_len = inputs["input_ids"].shape[1]
    assert eviction.report is not None
    real = eviction.report.modality >= 0
    assert torch.equal(real, inputs["attention_mask"].bool())
    assert torch.equal(eviction.report.modality == 0, is_text)
    for mask in kept_masks(eviction, prompt_len).values():
        assert torch.equal(mask[:, 0], is_text)
    with masked_reference(vision_model, prompt_len, kept_masks(eviction, prompt_len)):
        assert_close(logits_of(actual), logits_of(generate(vision_model, inputs)))


def test_bfloat16(vision_model: Any, policy: PrefillPolicy) -> None:
    model = copy.deepcopy(vision_model).bfloat16()
    inputs = make_inputs(model, BATCH)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs, num_new=2)
    cache = actual.past_key_values
    assert {layer.dtype for layer in cache.layers} == {torch.bfloat16}
    with masked_reference(model, prompt_len, kept_masks(eviction, prompt_len)):
        expected = generate(model, inputs, num_new=2)
    for step in range(2):
        cosine = torch.cosine_similarity(
            logits_of(actual)[:, step].float(), logits_of(expected)[:, step].float(), dim=-1
        )
        assert (cosine > 0.995).all()
        if not torch.equal(
            actual.sequences[:, : prompt_len + 1 + step],
            expected.sequences[:, : prompt_len + 1 + step],
        ):
            break


def test_video_spans() -> None:
    model = get_model("qwen2_5_vl")
    text = torch.randint(10, 90, (1, 30))
    video = torch.full((1, 32), model.config.video_token_id)
    input_ids = torch.cat([text[:, :5], video, text[:, 5:20]], 1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == model.config.video_token_id).long() * 2,
        "pixel_values_videos": torch.randn(128, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }
    with kvevict.evict(model, TGVKV(keep=0.5)) as eviction:
        generate(model, inputs)
    assert eviction.report is not None
    assert eviction.report.modality[0].tolist() == [0] * 5 + [2] * 32 + [0] * 15
    text_columns = {*range(5), *range(37, 52)}
    assert all(text_columns <= set(k.kept_indices[0, 0].tolist()) for k in eviction.kept)


# v of a video, i of an image, t of text; a frame is 4 x 4 tokens.
FRAME, IMAGE_SPAN = "v" * 16, "i" * 16
VIDEO_ROWS = {
    "frames": f"tttt{FRAME}tt{FRAME}tt{FRAME}tttttttt",
    "image_and_video": f"ttt{IMAGE_SPAN}ttt{FRAME}tt{FRAME}ttttttt",
    "video_and_image": f"ttt{FRAME}tt{FRAME}ttt{IMAGE_SPAN}ttttttt",
    "video_last": f"tttttt{IMAGE_SPAN}tttttt{FRAME}tt{FRAME}",
}


def video_inputs(model: Any, row: str) -> dict[str, Tensor]:
    """Return a prompt for a Qwen3-VL, whose frames stand apart, as if between timestamps."""
    modality = torch.tensor([["tiv".index(letter) for letter in row]])
    ids = torch.tensor([0, model.config.image_token_id, model.config.video_token_id])[modality]
    inputs = {
        "input_ids": torch.where(modality == 0, torch.randint(10, 90, modality.shape), ids),
        "attention_mask": torch.ones_like(modality),
        "mm_token_type_ids": modality,
    }
    for letter, pixels, grid in (
        ("i", "pixel_values", "image_grid_thw"),
        ("v", "pixel_values_videos", "video_grid_thw"),
    ):
        num_frames = row.count(letter) // 16
        if num_frames:
            inputs[pixels] = torch.randn(64 * num_frames, 3 * 2 * 14 * 14)
            inputs[grid] = torch.tensor([[num_frames, 8, 8]])
    return inputs


@pytest.mark.parametrize("text_score", ["paper", "released"])
@pytest.mark.parametrize("name", VIDEO_ROWS)
def test_video_frames_equal_the_oracle(name: str, text_score: Any) -> None:
    """Frames between text, beside an image, and with no text behind them."""
    model, row = get_model("qwen3_vl"), VIDEO_ROWS[name]
    inputs = video_inputs(model, row)
    with masked_reference(model, len(row)) as reference:
        generate(model, inputs, num_new=1)
    policy = TGVKV(keep=0.4, text_score=text_score)
    with kvevict.evict(model, policy) as eviction:
        generate(model, inputs, num_new=1)
    assert eviction.report is not None
    assert eviction.report.modality[0].tolist() == ["tiv".index(letter) for letter in row]
    layers = [[t[0] for t in reference.recorded[i][0]] for i in range(NUM_LAYERS)]
    sequence = oracles.Sequence(row, *map(list, zip(*layers, strict=True)))
    expected = oracles.keep_by_oracle("tgv_kv", policy, sequence)
    for layer, kept in zip(eviction.kept, expected, strict=True):
        count = int(layer.kept_lens[0, 0])
        assert [layer.kept_indices[0, 0, :count].tolist()] == kept


def test_modality_from_the_user() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, [ONE_IMAGE])
    is_image = inputs["input_ids"] == model.config.image_token_id
    with kvevict.evict(model, TGVKV(keep=0.4)) as eviction:
        expected = generate(model, inputs)
    found = eviction.kept
    embeds = embed(model, inputs)
    with kvevict.evict(model, TGVKV(keep=0.4), modality=is_image) as eviction:
        actual = generate(model, {"inputs_embeds": embeds})
    for a, b in zip(eviction.kept, found, strict=True):
        assert torch.equal(a.kept_indices, b.kept_indices)
    assert torch.equal(logits_of(actual), logits_of(expected))
    with (
        kvevict.evict(model, TGVKV(keep=0.4)),
        pytest.raises(ValueError, match="cannot tell image tokens from text"),
    ):
        generate(model, {"inputs_embeds": embeds})


def embed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the decoder's input embeddings."""
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


# Real memory


def test_full_storages_are_freed(vision_model: Any, policy: PrefillPolicy) -> None:
    inputs = make_inputs(vision_model, [TWO_IMAGES])
    seen = []

    @dataclass(frozen=True)
    class Spy(type(policy)):  # type: ignore[misc]
        def observe(self, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
            seen.extend([weakref.ref(key.untyped_storage()), weakref.ref(value.untyped_storage())])
            return super().observe(query, key, value, *a, **k)

    spy = Spy(**vars(policy))
    with kvevict.evict(vision_model, spy) as eviction, torch.no_grad():
        output = vision_model(**inputs, use_cache=True)
    gc.collect()
    assert len(seen) == 2 * NUM_LAYERS
    assert all(ref() is None for ref in seen)
    report, cache = eviction.report, output.past_key_values
    assert report is not None
    stored = sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert stored == report.bytes_after < 0.45 * report.bytes_before
    assert report.bytes_peak == report.bytes_before + report.bytes_after


# Later turns


SECOND_TURN = Row(9, ())


def two_turns(
    model: Any, inputs: dict[str, Tensor], mode: str, num_new: int = 5, padding: int = 0
) -> tuple[Tensor, Any]:
    """Generate, then continue on the same cache; return the logits of the second turn.

    `padding` masks that many tokens of the first sequence before its second question.
    """
    first = generate(model, inputs, num_new)
    cache = first.past_key_values
    generator = torch.Generator().manual_seed(7)
    batch_size = len(first.sequences)
    question = torch.randint(10, 90, (batch_size, 9), generator=generator)
    # The last generated token is not in the cache yet.
    conversation = torch.cat([first.sequences, question], 1)
    added = conversation.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch_size, added).long()], 1)
    first_new = conversation.shape[1] - 9
    mask[0, first_new : first_new + padding] = 0
    types = inputs.get("mm_token_type_ids")
    if types is not None:
        types = torch.cat([types, torch.zeros(batch_size, added).long()], 1)
    if mode == "whole conversation":
        again = {"input_ids": conversation, "attention_mask": mask}
    else:
        new = conversation[:, cache.get_seq_length() :]
        assert new.shape[1] == 10
        again = {"input_ids": new, "attention_mask": mask}
    if types is not None:
        again["mm_token_type_ids"] = types[:, -again["input_ids"].shape[1] :]
    second = generate(model, again, num_new, past_key_values=cache)
    return logits_of(second), second.past_key_values


@pytest.mark.parametrize("mode", ["whole conversation", "new tokens"])
def test_second_turn_on_the_evicted_cache(
    model: Any, policy: PrefillPolicy, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual, cache = two_turns(model, inputs, mode)
    assert len(eviction.reports) == 1
    assert cache.get_seq_length() == prompt_len + 5 + 9 + 4
    with masked_reference(model, prompt_len, kept_masks(eviction, prompt_len)):
        expected, _ = two_turns(model, inputs, mode)
    assert_close(actual, expected)


def test_second_turn_with_padding(model: Any, policy: PrefillPolicy) -> None:
    """Questions of different lengths: padding between the turns is not attended later either."""
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual, cache = two_turns(model, inputs, "whole conversation", padding=4)
    if isinstance(cache.layers[0], EvictedLayer):
        columns = cache.layers[0].store.tags()[..., COLUMN]
        padding = torch.arange(prompt_len + 5, prompt_len + 9)
        assert not torch.isin(columns[0], padding).any()
        assert torch.isin(columns[1], padding).sum() == 4 * columns.shape[1]
    with masked_reference(model, prompt_len, kept_masks(eviction, prompt_len)):
        expected, _ = two_turns(model, inputs, "whole conversation", padding=4)
    assert_close(actual, expected)


def test_a_later_turn_with_another_image() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, [ONE_IMAGE])
    turn = make_inputs(model, [Row(3, (4,))], seed=1)
    question = torch.randint(10, 90, (1, 5))

    @torch.no_grad()
    def run(first: PrefillPolicy, last: PrefillPolicy) -> list[Eviction]:
        with kvevict.evict(model, first) as one:
            cache = model(**inputs).past_key_values
            del turn["attention_mask"]
            model(**turn, past_key_values=cache)
            turn["attention_mask"] = torch.ones(1, 23)
        with kvevict.evict(model, last, every_turn=True) as two:
            model(input_ids=question, past_key_values=cache)
        return [one, two]

    one, two = run(TGVKV(keep=0.7), TGVKV(keep=0.6, num_sink=0))
    assert one.report is not None
    assert two.report is not None
    new = [0] * 3 + [1] * 16 + [0] * 4
    assert two.report.modality[0, 33:].tolist() == [*new, *[0] * 5]
    # Text goes first, whichever turn it came from.
    text = {i for i, m in enumerate(two.report.modality[0].tolist()) if m == 0}
    for before, after in zip(one.kept, two.kept, strict=True):
        had = {*before.kept_indices[0, 0].tolist(), *range(33, 61)}
        has = {*after.kept_indices[0, 0].tolist()}
        assert has < had
        assert text & had <= has or has <= text


def test_plain_forward_calls_need_no_positions(policy: PrefillPolicy) -> None:
    """A loop of `model(...)` without `position_ids` counts from the cache's length."""
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    prompt_len = inputs["input_ids"].shape[1]
    turns = [torch.randint(10, 90, (1, count)) for count in (1, 1, 7, 1)]

    @torch.no_grad()
    def run() -> Tensor:
        cache = DynamicCache(config=model.config)
        logits = [model(**inputs, past_key_values=cache).logits]
        logits += [model(input_ids=turn, past_key_values=cache).logits for turn in turns]
        return torch.cat(logits, 1)

    with kvevict.evict(model, policy) as eviction:
        actual = run()
    with masked_reference(model, prompt_len, kept_masks(eviction, prompt_len)):
        assert_close(actual, run())


def test_a_new_context_continues_an_evicted_cache(policy: PrefillPolicy) -> None:
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    token = torch.tensor([[20]])
    with torch.no_grad():
        with kvevict.evict(model, policy):
            cache = model(**inputs).past_key_values
            model(input_ids=token, past_key_values=cache)
            copied = copy.deepcopy(cache)
            expected = model(input_ids=token, past_key_values=cache).logits
        with pytest.raises(RuntimeError, match="continue it inside"):
            model(input_ids=token, past_key_values=copied)
        with kvevict.evict(model, SnapKV(keep=0.9)) as eviction:
            actual = model(input_ids=token, past_key_values=copied).logits
    assert torch.equal(actual, expected)
    assert eviction.report is None


@pytest.mark.parametrize("keep", [0.3, 20])
def test_every_turn(keep: float | int) -> None:
    """Budgets refer to the whole conversation, kept columns to its positions."""
    model = get_model("llava")
    inputs = make_inputs(model, BATCH)
    with kvevict.evict(model, SnapKV(keep=keep, window=6), every_turn=True) as eviction:
        _, cache = two_turns(model, inputs, "whole conversation")
    first, second = eviction.reports
    lens = inputs["attention_mask"].sum(1)
    for report, total in ((first, lens), (second, lens + 14)):
        for layer in report.kept:
            expected = [min(int(n * keep) if keep < 1 else keep, n) for n in total.tolist()]
            assert layer.kept_lens.tolist() == [[n, n] for n in expected]
    columns = inputs["input_ids"].shape[1] + 14
    assert second.modality.shape[1] == columns
    for old, new in zip(first.kept, second.kept, strict=True):
        for b in range(3):
            for h in range(2):
                had = {*old.kept_indices[b, h].tolist()} | {*range(columns - 14, columns)}
                has = {*new.kept_indices[b, h].tolist()} - {-1}
                assert has <= had
                assert {*range(columns - 6, columns)} & had <= has | had
    assert cache.layers[0].keys.shape[2] < columns


def test_every_turn_equals_the_oracle() -> None:
    """The second eviction sees, per KV head, what the first left and the new tokens."""
    model = get_model("llava")
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    policy = SnapKV(keep=0.4, window=6, num_sink=2, pool_kernel=1)
    with kvevict.evict(model, policy, every_turn=True) as eviction:
        two_turns(model, inputs, "whole conversation")
    first, second = eviction.reports
    masks = {layer.layer_idx: kept_mask(layer.kept_indices, prompt_len) for layer in first.kept}
    with masked_reference(model, prompt_len, masks) as reference:
        two_turns(model, inputs, "whole conversation")
    for layer in second.kept:
        query, key, _ = reference.recorded[layer.layer_idx][1]
        kv_len = key.shape[2]
        for b, total in enumerate(inputs["attention_mask"].sum(1).tolist()):
            for h in range(2):
                left = masks[layer.layer_idx][b, h].nonzero().flatten().tolist()
                columns = left + list(range(prompt_len, kv_len))
                q = query[b, 2 * h : 2 * h + 2, -6:].double()
                logits = q @ key[b, h, columns].double().T / key.shape[-1] ** 0.5
                row = torch.arange(kv_len - 6, kv_len)[:, None]
                logits = logits.masked_fill(torch.tensor(columns) > row, -torch.inf)
                score = dict(zip(columns, logits.softmax(-1).sum((0, 1)).tolist(), strict=True))
                forced = columns[:2] + columns[-6:]
                best = sorted(columns[2:-6], key=lambda j: -score[j])
                budget = int(0.4 * (total + 14) + 1e-6)
                expected = sorted(forced + best[: budget - 8])
                assert layer.kept_indices[b, h, : len(expected)].tolist() == expected


def test_every_turn_with_shared_lists() -> None:
    model = get_model("qwen2_5_vl")
    inputs = make_inputs(model, [TWO_IMAGES])
    with kvevict.evict(model, TGVKV(keep=0.5), every_turn=True) as eviction:
        two_turns(model, inputs, "new tokens")
    first, second = eviction.reports
    images = {*(inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()}
    for old, new in zip(first.kept, second.kept, strict=True):
        assert {*new.kept_indices[0, 0].tolist()} & images <= {*old.kept_indices[0, 0].tolist()}
    assert second.bytes_after < second.bytes_before


# Other ways to decode


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_beam_search_reorders_the_bookkeeping(name: str, policy: PrefillPolicy) -> None:
    model = get_model(name)
    # One image per row: older versions of transformers mix up the images of a row with beams.
    inputs = make_inputs(model, [ONE_IMAGE, Row(9, (14,))])
    prompt_len = inputs["input_ids"].shape[1]
    options = {"num_beams": 3, "num_return_sequences": 2, "num_new": 7, "output_scores": True}
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs, **options)
    with masked_reference(model, prompt_len, kept_masks(eviction, prompt_len)):
        expected = generate(model, inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(actual.sequences_scores, expected.sequences_scores)


def test_assisted_generation_is_refused() -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [TWO_IMAGES])
    inputs["input_ids"][0, -5:] = inputs["input_ids"][0, 10:15]
    with (
        kvevict.evict(model, SnapKV(keep=0.3)),
        pytest.raises(ValueError, match="assisted generation"),
    ):
        generate(model, inputs, num_new=12, prompt_lookup_num_tokens=3)


def test_later_tokens_can_be_cropped() -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [TWO_IMAGES])
    turn = torch.randint(10, 90, (1, 6))
    with kvevict.evict(model, SnapKV(keep=0.3)), torch.no_grad():
        cache = model(**inputs).past_key_values
        expected = model(input_ids=turn[:, :4], past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=turn, past_key_values=cache)
        cache.crop(-4)
        actual = model(input_ids=turn[:, 2:4], past_key_values=cache).logits
    assert_close(actual, expected[:, 2:])


def test_an_evicted_layer_as_a_cache_layer() -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [TWO_IMAGES, ONE_IMAGE])
    with kvevict.evict(model, SnapKV(keep=0.3, window=4)), torch.no_grad():
        cache = model(**inputs).past_key_values
        layer = cache.layers[1]
        stored, seen = layer.keys.shape[2], layer.get_seq_length()
        assert seen == inputs["input_ids"].shape[1] > stored
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        columns = layer.store.slots.columns
        assert columns.shape == (2, 2, stored)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert not torch.equal(columns[0], columns[1])
        assert torch.equal(layer.store.slots.columns, columns.flip(0))
        assert layer.keys.shape[0] == 2
        with pytest.raises(ValueError, match="only the 0 tokens"):
            cache.crop(-1)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(**inputs, past_key_values=cache)
        assert again.past_key_values.layers[1].keys.shape[2] == stored


def test_only_full_attention_layers_are_evicted() -> None:
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(
        **TEXT_CONFIG, use_sliding_window=True, sliding_window=16, layer_types=kinds
    )
    model = Qwen2ForCausalLM(config).eval()
    inputs = make_inputs(model, [LONG_ROW, ONE_IMAGE])
    expected = generate(model, inputs)
    with kvevict.evict(model, SnapKV(keep=1.0)):
        assert_close(logits_of(generate(model, inputs)), logits_of(expected))
    with kvevict.evict(model, SnapKV(keep=0.3, window=8)) as eviction:
        cache = generate(model, inputs).past_key_values
    assert [layer.layer_idx for layer in eviction.kept] == [0, 2]
    assert cache.layers[1].keys.shape[2] == 15


# The model afterwards, and refusals


def state_of(model: Any) -> Any:
    """Return what a context must leave as it was."""
    hooks = [
        (
            name,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._forward_hooks_always_called),
        )
        for name, m in model.named_modules()
    ]
    configs = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return hooks, configs, model.config.to_dict()


def test_the_model_is_as_before(model: Any) -> None:
    inputs = make_inputs(model, [ONE_IMAGE])
    before = state_of(model)
    expected = generate(model, inputs)
    with kvevict.evict(model, TGVKV(keep=0.2)):
        generate(model, inputs)
    assert state_of(model) == before
    with pytest.raises(ZeroDivisionError), kvevict.evict(model, TGVKV(keep=0.2)):
        raise ZeroDivisionError
    assert state_of(model) == before
    assert torch.equal(logits_of(generate(model, inputs)), logits_of(expected))
    assert not context._OPEN


def test_an_exception_inside_a_forward(model: Any) -> None:
    @dataclass(frozen=True)
    class Broken(SnapKV):
        def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
            raise ZeroDivisionError

    inputs = make_inputs(model, [ONE_IMAGE])
    before = state_of(model)
    with kvevict.evict(model, Broken(keep=0.2)) as eviction:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                generate(model, inputs)
    assert not eviction.reports
    assert state_of(model) == before


def test_everything_is_undone_though_one_step_fails() -> None:
    model = copy.deepcopy(get_model("llava"))
    hooks, _, _ = state_of(model)
    switch = model.set_attn_implementation

    def refuse_sdpa(implementation: dict[str, str]) -> None:
        if implementation == {"text_config": "sdpa"}:
            raise ZeroDivisionError
        switch(implementation)

    model.set_attn_implementation = refuse_sdpa
    with pytest.raises(ZeroDivisionError), kvevict.evict(model, TGVKV(keep=0.2)):
        pass
    assert state_of(model)[0] == hooks
    assert not context._OPEN


def test_models_that_share_a_config() -> None:
    config = LlamaConfig(**TEXT_CONFIG)
    model, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    inputs = make_inputs(model, [ONE_IMAGE])
    with kvevict.evict(model, SnapKV(keep=0.5)):
        with (
            pytest.raises(ValueError, match="shares its config with a model inside an open"),
            kvevict.evict(other, SnapKV(keep=0.5)),
        ):
            pass
        with pytest.raises(RuntimeError, match="by a model that shares its config"):
            generate(other, inputs, num_new=1)
        generate(model, inputs, num_new=1)
    with kvevict.evict(other, SnapKV(keep=0.5)) as eviction:
        generate(other, inputs, num_new=1)
    assert eviction.kept


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_vision_tower_keeps_its_attention(implementation: str) -> None:
    model = VISION_MODELS["llava"]()
    model.set_attn_implementation(implementation)
    vision = model.model.vision_tower.config
    with kvevict.evict(model, TGVKV(keep=0.2)):
        assert vision._attn_implementation == implementation
        assert model.config.text_config._attn_implementation == integration.ATTENTION_NAME
    assert model.config.text_config._attn_implementation == implementation


def refuse_static_cache(model: Any, inputs: dict[str, Tensor]) -> None:
    generate(model, inputs, cache_implementation="static")


def refuse_static_cache_object(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=128))


def refuse_no_cache(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs, use_cache=False)


def refuse_custom_mask(model: Any, inputs: dict[str, Tensor]) -> None:
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    model(**{**inputs, "attention_mask": mask})


def refuse_short_mask(model: Any, inputs: dict[str, Tensor]) -> None:
    cache = model(**inputs).past_key_values
    model(
        input_ids=torch.tensor([[20, 21]]),
        attention_mask=torch.ones(1, 2),
        past_key_values=cache,
    )


def refuse_hole(model: Any, inputs: dict[str, Tensor]) -> None:
    inputs["attention_mask"][0, 5] = 0
    model(**inputs)


def refuse_nested(model: Any, inputs: dict[str, Tensor]) -> None:
    with kvevict.evict(model, SnapKV(keep=0.5)):
        pass


REFUSALS = {
    refuse_static_cache: "must be a DynamicCache, got a layer of StaticLayer",
    refuse_static_cache_object: "must be a DynamicCache, got a layer of StaticLayer",
    refuse_no_cache: "use_cache=False",
    refuse_custom_mask: "more than causal and padding",
    refuse_short_mask: "must cover the whole conversation",
    refuse_hole: "padding in the middle",
    refuse_nested: "already inside an open",
}


@pytest.mark.parametrize("attempt", REFUSALS, ids=lambda f: f.__name__)
def test_refusals(attempt: Any) -> None:
    model = get_model("llava")
    inputs = make_inputs(model, [ONE_IMAGE])
    before = state_of(model)
    with (
        torch.no_grad(),
        kvevict.evict(model, TGVKV(keep=0.3)),
        pytest.raises(ValueError, match=REFUSALS[attempt]),
    ):
        attempt(model, inputs)
    assert state_of(model) == before


def gemma3_inputs() -> tuple[Any, dict[str, Tensor]]:
    """Images attend in both directions."""
    config = Gemma3Config(
        text_config={**TEXT_CONFIG, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        mm_tokens_per_image=16,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    inputs = make_inputs(get_model("qwen3_vl"), [ONE_IMAGE])
    input_ids = inputs["input_ids"]
    return Gemma3ForConditionalGeneration(config).eval(), {
        "input_ids": input_ids,
        "token_type_ids": (input_ids == 5).long(),
        "pixel_values": torch.randn(1, 3, 56, 56),
    }


def deepseek_inputs() -> tuple[Any, dict[str, Tensor]]:
    """The cache holds compressed keys."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = DeepseekV3Config(
        **{name: TEXT_CONFIG[name] for name in names},
        num_hidden_layers=1,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return DeepseekV3ForCausalLM(config).eval(), {"input_ids": torch.randint(10, 90, (1, 20))}


def t5_inputs() -> tuple[Any, dict[str, Tensor]]:
    """An encoder and a decoder."""
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config).eval(), {"input_ids": torch.randint(10, 90, (1, 9))}


UNSUPPORTED = {
    gemma3_inputs: "images that attend in both directions",
    deepseek_inputs: "compressed caches",
    t5_inputs: "is an encoder-decoder model",
}


@pytest.mark.parametrize("build", UNSUPPORTED, ids=lambda f: f.__name__)
def test_unsupported_models_are_refused(build: Any) -> None:
    model, inputs = build()
    before = state_of(model)
    with (
        pytest.raises(ValueError, match=UNSUPPORTED[build]),
        kvevict.evict(model, TGVKV(keep=0.3)),
    ):
        generate(model, inputs, num_new=2)
    assert state_of(model) == before


def test_refused_arguments() -> None:
    model = get_model("llama")
    with pytest.raises(ValueError, match="policy must have the methods"):
        kvevict.evict(model, object())
    with pytest.raises(ValueError, match="modality must have shape"):
        kvevict.evict(model, TGVKV(keep=0.1), modality=torch.zeros(4))
    with pytest.raises(ValueError, match="has no SDPA attention"):
        unsupported = LlamaForCausalLM(LlamaConfig(**TEXT_CONFIG))
        unsupported.model._supports_sdpa = False
        kvevict.evict(unsupported, TGVKV(keep=0.1)).__enter__()
