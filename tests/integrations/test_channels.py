"""ThinK inside models: as a full cache whose channels are 0 and whose columns are masked."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import kvevict
from kvevict.channels import PackedSlots
from kvevict.integrations.transformers import EvictedLayer, Eviction
from kvevict.policies import H2O, TOVA, AdaKV, Prompt, SnapKV, ThinK, VLCache
from tests.integrations.masked_reference import faded_mask, kept_mask, masked_reference
from tests.integrations.runs import run_padded_turns
from tests.integrations.tiny_models import (
    LONG_ROW,
    MODELS,
    NUM_LAYERS,
    ONE_IMAGE,
    TWO_IMAGES,
    generate,
    get_model,
    make_inputs,
)

BATCH = [ONE_IMAGE, TWO_IMAGES, LONG_ROW]
HEAD_DIM = 16
POLICIES = {
    "alone": ThinK(num_recent=5),
    "shared": ThinK(TOVA(keep=0.4), ratio=0.6, num_recent=3),
    "per_head": ThinK(SnapKV(keep=0.5, window=6), window=8, num_recent=0),
    "buckets": ThinK(AdaKV(keep=0.3, window=4, floor=0.0), ratio=0.3, num_recent=4),
    "layers_differ": ThinK(VLCache(keep=0.4), num_recent=2),
}


def logits_of(output: Any) -> Tensor:
    """Return the logits of all steps [batch_size, num_new, vocab_size]."""
    return torch.stack(output.logits, 1)


@contextmanager
def faded_reference(
    model: Any, prompt_len: int, eviction: Eviction, policy: ThinK
) -> Iterator[None]:
    """Mask what was evicted, and zero the channels that were dropped."""
    masks = {layer.layer_idx: kept_mask(layer.kept_indices, prompt_len) for layer in eviction.kept}
    with masked_reference(model, prompt_len, masks) as reference:
        reference.faded = {
            layer.layer_idx: faded_mask(layer, policy.num_recent, prompt_len, HEAD_DIM)
            for layer in eviction.kept
        }
        yield


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", POLICIES)
def test_packing_equals_zeroing(name: str, model_name: str) -> None:
    """Decoding a left-padded batch."""
    model, policy = get_model(model_name), POLICIES[name]
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs, num_new=8)
    stores = [layer.store for layer in actual.past_key_values.layers]
    assert all(isinstance(store, PackedSlots) for store in stores)
    if name == "buckets":
        assert any(store.older.members is not None for store in stores)
    with faded_reference(model, prompt_len, eviction, policy):
        expected = generate(model, inputs, num_new=8)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["alone", "buckets"])
def test_beam_search(name: str) -> None:
    model, policy = get_model("llava"), POLICIES[name]
    inputs = make_inputs(model, [ONE_IMAGE, ONE_IMAGE])
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs, num_new=8, num_beams=3)
    with faded_reference(model, prompt_len, eviction, policy):
        expected = generate(model, inputs, num_new=8, num_beams=3)
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize("name", POLICIES)
def test_a_second_turn_with_padding(name: str) -> None:
    model, policy = get_model("llava"), POLICIES[name]
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    with kvevict.evict(model, policy) as eviction:
        actual, cached = run_padded_turns(model, inputs)
        report = kvevict.report(cached)
    with faded_reference(model, prompt_len, eviction, policy):
        expected, _ = run_padded_turns(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    new = torch.tensor([10, 7, 10])[:, None]
    for layer, kept in zip(report.layers, eviction.kept, strict=True):
        assert torch.equal(layer.kept_lens, (kept.kept_lens + new).expand(-1, 2))


@pytest.mark.parametrize("host", [None, SnapKV(keep=0.4, window=6)])
def test_no_channel_dropped_is_the_host_alone(host: Any) -> None:
    model = get_model("qwen2_5_vl")
    inputs = make_inputs(model, BATCH)
    # Of 16 channels 0.9 are none.
    for policy in (ThinK(ratio=0.0), ThinK(ratio=0.06)):
        if host is not None:
            policy = ThinK(host, policy.ratio)
        with kvevict.evict(model, policy) as eviction:
            actual = generate(model, inputs)
        assert all(layer.kept_channels is None for layer in eviction.kept)
        if host is None:
            assert all(type(layer) is DynamicLayer for layer in actual.past_key_values.layers)
            expected = generate(model, inputs)
        else:
            with kvevict.evict(model, host) as alone:
                expected = generate(model, inputs)
            assert eviction.report is not None
            assert alone.report is not None
            assert eviction.report.bytes_after == alone.report.bytes_after
            assert eviction.report.bytes_peak == alone.report.bytes_peak
            assert torch.equal(logits_of(actual), logits_of(expected))
        assert torch.equal(actual.sequences, expected.sequences)


# Memory


@pytest.mark.parametrize(("host", "kept"), [(None, 50), (SnapKV(keep=20, window=6), 20)])
def test_bytes_are_real(host: Any, kept: int) -> None:
    """int(16 * 0.4) = 6 of 16 channels are gone from all but the newest 5 keys; V is whole."""
    model = get_model("llava")
    inputs = make_inputs(model, [TWO_IMAGES])
    seen = []

    class Spy(ThinK):
        def observe(self, *tensors: Any, **options: Any) -> Any:
            seen.extend(weakref.ref(t.untyped_storage()) for t in tensors[1:3])
            return super().observe(*tensors, **options)

        def observe_later(self, first: Any, *tensors: Any, **options: Any) -> Any:
            return self.observe(*tensors, **options)

    policy = Spy(num_recent=5) if host is None else Spy(host, num_recent=5)
    with kvevict.evict(model, policy) as eviction, torch.no_grad():
        cached = model(**inputs).past_key_values
    gc.collect()
    assert len(seen) == 2 * NUM_LAYERS
    assert all(ref() is None for ref in seen)
    report, before_after = kvevict.report(cached), eviction.report
    assert before_after is not None
    of_layer = 2 * 4 * ((kept - 5) * (10 + 16) + 5 * 32)
    assert [layer.bytes_stored for layer in report.layers] == [of_layer] * NUM_LAYERS
    assert before_after.bytes_after == report.bytes_stored
    assert before_after.bytes_before == report.bytes_full == NUM_LAYERS * 2 * 4 * 50 * 32
    # One layer's older keys are there once more, whole.
    extra = report.bytes_stored + 2 * 4 * (kept - 5) * 16
    assert before_after.bytes_peak == before_after.bytes_before + extra
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cached.layers
        for block in layer.store.blocks
        for t in (block.keys, block.values)
    }
    assert sum(storages.values()) == report.bytes_stored
    for layer in cached.layers:
        assert layer.keys is None
        assert layer.store.older.slots.keys.shape == (1, 2, kept - 5, 10)
        assert layer.store.channels.shape == (1, 2, 10)


def test_a_step_appends_to_the_newer_keys_alone() -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [ONE_IMAGE])
    with kvevict.evict(model, POLICIES["alone"]), torch.no_grad():
        cached = model(**inputs).past_key_values
        blocks = [layer.store.older.slots for layer in cached.layers]
        places = [block.keys.data_ptr() for block in blocks]
        for _ in range(4):
            model(input_ids=torch.tensor([[20]]), past_key_values=cached)
    assert [layer.store.older.slots.keys.data_ptr() for layer in cached.layers] == places
    assert [layer.store.slots.stored for layer in cached.layers] == [9] * NUM_LAYERS


# The cache


@pytest.mark.parametrize("name", ["alone", "buckets"])
def test_copies_crops_and_batches(name: str) -> None:
    model = get_model("llama")
    inputs = make_inputs(model, [TWO_IMAGES])
    turn = torch.randint(10, 90, (1, 6))
    with kvevict.evict(model, POLICIES[name]), torch.no_grad():
        cached = model(**inputs).past_key_values
        copied = copy.deepcopy(cached)
        expected = model(input_ids=turn[:, :4], past_key_values=copied).logits
        model(input_ids=turn, past_key_values=cached)
        cached.crop(-4)
        actual = model(input_ids=turn[:, 2:4], past_key_values=cached).logits
        torch.testing.assert_close(actual, expected[:, 2:], rtol=0, atol=5e-5)
        with pytest.raises(ValueError, match="only the 4 tokens"):
            cached.crop(-5)
        cached.batch_repeat_interleave(2)
        again = model(input_ids=turn.expand(2, -1), past_key_values=cached).logits
        cached.crop(-6)
        cached.batch_select_indices(torch.tensor([1]))
        alone = model(input_ids=turn, past_key_values=cached).logits
        torch.testing.assert_close(again[1:], alone, rtol=0, atol=5e-5)
        cached.reset()
        assert cached.get_seq_length() == 0
        model(**inputs, past_key_values=cached)
        assert all(isinstance(layer.store, PackedSlots) for layer in cached.layers)


def test_another_context_continues_it() -> None:
    """It appends; it evicts no packed keys again."""
    model = get_model("llava")
    inputs = make_inputs(model, [ONE_IMAGE])
    turn = torch.randint(10, 90, (1, 5))
    with torch.no_grad():
        with kvevict.evict(model, POLICIES["per_head"]):
            cached = model(**inputs).past_key_values
            expected = model(input_ids=turn, past_key_values=copy.deepcopy(cached)).logits
        with kvevict.evict(model, H2O(keep=0.5)):
            actual = model(input_ids=turn, past_key_values=copy.deepcopy(cached)).logits
        with (
            kvevict.evict(model, SnapKV(keep=0.5), every_turn=True),
            pytest.raises(ValueError, match="keys lack channels cannot be evicted again"),
        ):
            model(input_ids=turn, past_key_values=cached)
    assert torch.equal(actual, expected)
    assert all(isinstance(layer, EvictedLayer) for layer in cached.layers)
    assert cached.get_seq_length() == inputs["input_ids"].shape[1]


class Evens:
    """Every other channel, and nothing else: no `PrefillPolicy`."""

    num_recent = 4

    def channels(self, query: Tensor, key: Tensor, prompt: Prompt) -> Tensor:
        """Choose the same for all heads."""
        even = torch.arange(0, key.shape[3], 2, dtype=torch.int32)
        return even.expand(*key.shape[:2], -1).contiguous()


def test_a_policy_of_ones_own_that_drops_channels() -> None:
    model = get_model("qwen3_vl")
    inputs = make_inputs(model, BATCH)
    prompt_len = inputs["input_ids"].shape[1]
    policy = Evens()
    with kvevict.evict(model, policy) as eviction:
        actual = generate(model, inputs)
    with faded_reference(model, prompt_len, eviction, policy):  # type: ignore[arg-type]
        expected = generate(model, inputs)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)


def test_what_would_evict_again_is_refused() -> None:
    model = get_model("llava")

    class Both(H2O):
        num_recent = 4
        channels = Evens.channels

    with pytest.raises(ValueError, match=r"ThinK drops channels of the keys, .* every_turn=True"):
        kvevict.evict(model, ThinK(), every_turn=True)
    with pytest.raises(ValueError, match=r"Both drops channels .* with eviction while decoding"):
        kvevict.evict(model, Both(keep=0.5))  # type: ignore[arg-type]
