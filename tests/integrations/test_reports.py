"""What `kvevict.report` says about a cache, against its tensors; and heads of different length."""

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
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

import kvevict
from kvevict.integrations.transformers import EvictedLayer
from kvevict.policies import H2O, TGVKV, LayerScores, SnapKV
from kvevict.slots import BUCKET_WASTE
from tests.integrations.masked_reference import kept_mask, masked_reference
from tests.integrations.runs import run_padded_turns
from tests.integrations.tiny_models import (
    LONG_ROW,
    NUM_LAYERS,
    ONE_IMAGE,
    TEXT_CONFIG,
    TWO_IMAGES,
    VISION_MODELS,
    generate,
    get_model,
    make_inputs,
)

BATCH = [ONE_IMAGE, TWO_IMAGES, LONG_ROW]
TOKEN_BYTES = 2 * 16 * 4  # Of one KV head: key and value of 16 float32.


@dataclass(frozen=True)
class Lopsided(SnapKV):
    """The first KV head keeps a fifth of what the second keeps."""

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        tokens = super().budgets(layers)
        if layers[0].scores.shape[1] == 2:
            return torch.stack([(tokens // 5).clamp(min=1), tokens], -1)
        # In a later turn every KV head is a sequence of its own.
        is_first = torch.arange(tokens.shape[1]) % 2 == 0
        return torch.where(is_first, tokens // 5, tokens)


LOPSIDED = Lopsided(keep=0.5, window=3, num_sink=1)


def logits_of(output: Any) -> Tensor:
    """Return the logits of all steps [batch_size, num_new, vocab_size]."""
    return torch.stack(output.logits, 1)


# Heads of different length


@pytest.mark.parametrize(
    ("model_name", "options"),
    [*((name, {}) for name in VISION_MODELS), ("llava", {"num_beams": 2})],
)
def test_buckets_compute_what_masking_does(model_name: str, options: dict[str, int]) -> None:
    model = get_model(model_name)
    inputs = make_inputs(model, [ONE_IMAGE, ONE_IMAGE] if options else BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, LOPSIDED) as eviction:
        actual = generate(model, inputs, num_new=10, **options)
    layers = actual.past_key_values.layers
    assert any(layer.store.members is not None for layer in layers)
    masks = {i.layer_idx: kept_mask(i.kept_indices, prompt_len) for i in eviction.kept}
    with masked_reference(model, prompt_len, masks):
        expected = generate(model, inputs, num_new=10, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    if not options:
        torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("every_turn", [False, True])
def test_a_later_turn_on_buckets(every_turn: bool) -> None:
    """A question with padding; with every_turn the heads are united, scored and split again."""
    model = get_model("llava")
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, LOPSIDED, every_turn=every_turn) as eviction:
        actual, cached = run_padded_turns(model, inputs)
    masks = {i.layer_idx: kept_mask(i.kept_indices, prompt_len) for i in eviction.reports[0].kept}
    with masked_reference(model, prompt_len, masks):
        expected, _ = run_padded_turns(model, inputs)
    same = slice(0, 4 if every_turn else 5)
    torch.testing.assert_close(actual[:, same], expected[:, same], rtol=0, atol=1e-4)
    assert all(isinstance(layer, EvictedLayer) for layer in cached.layers)
    assert len(eviction.reports) == 1 + every_turn
    for layer, kept in zip(cached.layers, eviction.kept, strict=True):
        assert layer.store.members is not None
        if every_turn:
            columns = layer.store.tags()[..., 0]
            assert torch.equal((columns >= 0).sum(-1) - 1, kept.kept_lens.long())


def test_copies_and_crops_of_buckets() -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [TWO_IMAGES])
    turn = torch.randint(10, 90, (1, 6))
    with kvevict.evict(model, LOPSIDED), torch.no_grad():
        cached = model(**inputs).past_key_values
        copied = copy.deepcopy(cached)
        expected = model(input_ids=turn[:, :4], past_key_values=copied).logits
        model(input_ids=turn, past_key_values=cached)
        cached.crop(-4)
        actual = model(input_ids=turn[:, 2:4], past_key_values=cached).logits
        layer = cached.layers[0]
        assert layer.keys is None
        with pytest.raises(ValueError, match="differ in length, see `buckets`"):
            _ = layer.store.slots
        cached.batch_repeat_interleave(2)
        cached.batch_select_indices(torch.tensor([1]))
        model(input_ids=turn, past_key_values=cached)
        with pytest.raises(ValueError, match="crop takes a negative number"):
            layer.crop(1)
        with pytest.raises(ValueError, match="only the 10 tokens"):
            cached.crop(-11)
    torch.testing.assert_close(actual, expected[:, 2:], rtol=0, atol=5e-5)


def test_full_storages_are_freed() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, BATCH)
    seen = []

    class Spy(Lopsided):
        def observe(self, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
            seen.extend([weakref.ref(key.untyped_storage()), weakref.ref(value.untyped_storage())])
            return super().observe(query, key, value, *a, **k)

    with kvevict.evict(model, Spy(**vars(LOPSIDED))) as eviction, torch.no_grad():
        cached = model(**inputs).past_key_values
    gc.collect()
    assert len(seen) == 2 * NUM_LAYERS
    assert all(ref() is None for ref in seen)
    report, eviction_report = kvevict.report(cached), eviction.report
    assert eviction_report is not None
    ideal = sum(int(layer.kept_lens.sum()) for layer in report.layers) * TOKEN_BYTES
    assert ideal <= report.bytes_stored <= BUCKET_WASTE * ideal
    assert report.bytes_stored == eviction_report.bytes_after
    assert eviction_report.bytes_peak == eviction_report.bytes_before + report.bytes_stored
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cached.layers
        for bucket in layer.store.buckets
        for t in (bucket.keys, bucket.values)
    }
    assert sum(storages.values()) == report.bytes_stored


# Reports


@pytest.mark.parametrize(
    "policy", [TGVKV(keep=0.4), LOPSIDED, H2O(keep=0.4)], ids=lambda p: type(p).__name__
)
def test_tokens_per_layer_head_and_modality(policy: Any) -> None:
    model = get_model("llava")
    inputs = make_inputs(model, BATCH)
    is_image = inputs["input_ids"] == model.config.image_token_id
    with kvevict.evict(model, policy) as eviction:
        cached = generate(model, inputs, num_new=1).past_key_values
        report = kvevict.report(cached)
    assert report.seen_len == inputs["input_ids"].shape[1]
    for layer, kept in zip(report.layers, eviction.kept, strict=True):
        mask = kept_mask(kept.kept_indices, report.seen_len)
        images = (mask & is_image[:, None]).sum(-1).expand(-1, 2)
        assert layer.num_by_modality is not None
        assert torch.equal(layer.num_by_modality[..., 1], images)
        assert torch.equal(layer.num_by_modality[..., 0], mask.sum(-1).expand(-1, 2) - images)
        assert (layer.num_by_modality[..., 2:] == 0).all()
        assert torch.equal(layer.kept_lens, mask.sum(-1).expand(-1, 2))
        assert layer.bytes_full == 3 * 2 * report.seen_len * TOKEN_BYTES
        assert layer.bytes_bookkeeping > 0
    assert eviction.report is not None
    assert report.bytes_full == eviction.report.bytes_before
    assert report.bytes_stored == eviction.report.bytes_after


def test_a_report_is_a_table() -> None:
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    with kvevict.evict(model, SnapKV(keep=10, window=4)):
        cached = generate(model, inputs, num_new=3).past_key_values
    lines = str(kvevict.report(cached)).splitlines()
    assert lines[0].startswith("52 columns seen; full cache 0.04 MiB, bookkeeping 0.0")
    assert lines[1].split() == [
        "layer",
        "tokens",
        "least-most",
        "text",
        "image",
        "stored",
        "of",
        "full",
    ]
    for i, line in enumerate(lines[2:-1]):
        assert line.split()[:3] == [str(i), "12", "12-12"]
        text, image = map(float, line.split()[3:5])
        assert text + image == 12
    assert lines[-1].split()[0] == "all"
    assert len({len(line) for line in lines[1:]}) == 1


def test_layers_that_were_never_evicted() -> None:
    """An ordinary cache, a sliding window, an empty cache, and what is no such cache."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(
        **TEXT_CONFIG, use_sliding_window=True, sliding_window=16, layer_types=kinds
    )
    model = Qwen2ForCausalLM(config).eval()
    inputs = make_inputs(model, [LONG_ROW, ONE_IMAGE])
    with torch.no_grad():
        cached = model(**inputs).past_key_values
    report = kvevict.report(cached)
    assert [layer.num_by_modality for layer in report.layers] == [None] * 3
    assert [int(layer.kept_lens[0, 0]) for layer in report.layers] == [58, 15, 58]
    assert report.layers[0].bytes_stored == report.layers[0].bytes_full == 2 * 2 * 58 * TOKEN_BYTES
    assert "-" in str(report)
    with kvevict.evict(model, SnapKV(keep=0.3)), torch.no_grad():
        evicted = model(**inputs).past_key_values
        report = kvevict.report(evicted)
        assert [layer.num_by_modality is None for layer in report.layers] == [False, True, False]
        evicted.reset()
    empty = kvevict.report(DynamicCache(config=config))
    assert empty.bytes_stored == empty.bytes_full == empty.seen_len == 0
    assert str(empty).splitlines()[-1].split() == ["all", "0.00", "MiB", "-"]
    with pytest.raises(ValueError, match="cache must be a transformers Cache, got None"):
        kvevict.report(None)
    with pytest.raises(ValueError, match="must have dynamic layers, got a Static"):
        kvevict.report(StaticCache(config=config, max_cache_len=8))
