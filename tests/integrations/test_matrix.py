"""Every policy of the registry on every model: what is kept, and the next turn on what is left.

A new policy takes part by its name. The default tier meets every policy with every model, with both
dtypes and with every shape of batch; the tests marked slow are the rest of the product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import kvevict
from kvevict import policies
from tests.integrations.masked_reference import faded_mask, kept_mask, masked_reference
from tests.integrations.tiny_models import (
    LONG_ROW,
    MODELS,
    NUM_LAYERS,
    ONE_IMAGE,
    TWO_IMAGES,
    generate,
    make_inputs,
)
from tests.policies.merge_oracles import MERGES, Stored, merge_by_oracle
from tests.policies.oracles import Sequence, keep_by_oracle, think_channels

# What prompts of 33 to 58 tokens need other than the default.
FIELDS: dict[str, dict[str, Any]] = {
    "adakv": {"window": 8},
    "chunkkv": {"window": 8, "chunk_len": 4},
    "corm": {"keep": 0.6, "window": 8, "num_recent": 8},
    "h2o": {"decode": "append"},
    "hae": {"kappa": 1.0, "alpha": 1.0, "decode": "append"},
    "streaming_llm": {"decode": "append"},
    "d2o": {"decode": "append"},
    "dbudgetkv": {"keep": 0.6, "num_full": 1, "tolerance": 0.1},
    "lightkv_cache": {"keep": 0.6, "windows": (1,)},
    "keepkv": {"window": 8, "similarity": 0.3, "decode": "append"},
    "mixkv": {"window": 8, "host": "adakv"},
    "pyramidkv": {"window": 6, "num_sink": 2},
    "random": {"per_head": True},
    "snapkv": {"window": 8},
    "think": {"host": "adakv", "window": 8, "num_recent": 4},
    "zsmerge": {"num_residual": 2, "decode": "append"},
}
BATCHES = {
    "single": [ONE_IMAGE],
    "left_padded": [ONE_IMAGE, TWO_IMAGES, LONG_ROW],
    "two_images": [TWO_IMAGES],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_NEW = 10


def matrix() -> Iterator[Any]:
    """Yield all cases; of a policy and a model one after the other is not slow."""
    shapes = [(batch, dtype) for dtype in DTYPES for batch in BATCHES]
    for i, name in enumerate(policies.list(with_keep=True)):
        for j, model_name in enumerate(MODELS):
            for k, (batch, dtype) in enumerate(shapes):
                marks = [] if k == (i + j) % len(shapes) else [pytest.mark.slow]
                yield pytest.param(name, model_name, batch, dtype, marks=marks)


@cache
def get_model(model_name: str, dtype: str) -> Any:
    """Build each model once."""
    if dtype != "float32":
        return copy.deepcopy(get_model(model_name, "float32")).to(DTYPES[dtype])
    return MODELS[model_name]()


class Recorder:
    """A policy that remembers the tensors it saw."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.policy, name)
        if name != "observe_later":
            return attribute

        def observe_later(first: Any, *args: Any, **options: Any) -> Any:
            self._note(args[:3])
            return attribute(first, *args, **options)

        return observe_later

    def observe(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        self._note((query, key, value))
        return self.policy.observe(query, key, value, *args, **options)

    def _note(self, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        # Copies: a policy that merges writes into keys and values.
        query, key, value = (tensor.clone() for tensor in tensors)
        self.seen.append((query, key, value))


def letters_of(inputs: dict[str, Tensor], image_token_id: int | None) -> list[str]:
    """Return one letter per column, as the oracles read prompts."""
    letters = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        pairs = zip(ids.tolist(), mask.tolist(), strict=True)
        letters.append("".join("ti"[i == image_token_id] if real else "." for i, real in pairs))
    return letters


def two_turns(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Run the prompt, then a question on the same cache; return the question's logits."""
    first = generate(model, inputs, num_new=1)
    batch_size = len(inputs["input_ids"])
    question = torch.randint(10, 90, (batch_size, NUM_NEW), generator=torch.manual_seed(7))
    added = {
        "input_ids": question,
        "attention_mask": torch.ones_like(question),
        "mm_token_type_ids": torch.zeros_like(question),
    }
    again = {name: torch.cat([inputs[name], added[name]], 1) for name in added if name in inputs}
    second = generate(model, again, num_new=2, past_key_values=first.past_key_values)
    return torch.stack(second.logits, 1), second.past_key_values


def padded_batch(layers: list[Stored], prompt_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and weights of left-padded sequences."""

    def padded(states: Tensor, fill: float) -> Tensor:
        new = states.new_full((states.shape[0], prompt_len, *states.shape[2:]), fill)
        new[:, prompt_len - states.shape[1] :] = states
        return new

    return (
        torch.stack([padded(layer.keys, 0) for layer in layers]),
        torch.stack([padded(layer.values, 0) for layer in layers]),
        torch.stack([padded(layer.weights, 1) for layer in layers]),
    )


@pytest.mark.parametrize(("name", "model_name", "batch", "dtype"), matrix())
def test_a_policy_on_a_model(name: str, model_name: str, batch: str, dtype: str) -> None:
    model = get_model(model_name, dtype)
    inputs = make_inputs(model, BATCHES[batch])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(DTYPES[dtype])
    prompt_len = inputs["input_ids"].shape[1]
    policy = policies.get(name, **{"keep": 0.3, **FIELDS.get(name, {})})
    recorder = Recorder(policy)
    with kvevict.evict(model, recorder) as eviction:
        actual, cache = two_turns(model, inputs)
    assert len(eviction.reports) == 1
    assert len(recorder.seen) == NUM_LAYERS
    assert cache.get_seq_length() == prompt_len + NUM_NEW + 1

    # What is kept and stored, by the oracles of the policy on the tensors of this run.
    stored: list[list[Stored]] = []
    image_token_id = getattr(model.config, "image_token_id", None)
    for b, row in enumerate(letters_of(inputs, image_token_id)):
        padding = row.count(".")
        tensors = [[t[b, :, padding:].float() for t in layer] for layer in recorder.seen]
        sequence = Sequence(row[padding:], *map(list, zip(*tensors, strict=True)))
        expected_lists = keep_by_oracle(name, policy, sequence)
        stored.append(merge_by_oracle(name, policy, sequence, expected_lists))
        for layer, expected in zip(eviction.kept, expected_lists, strict=True):
            lists = zip(layer.kept_indices[b].tolist(), layer.kept_lens[b].tolist(), strict=True)
            kept = [[j - padding for j in indices[:count]] for indices, count in lists]
            assert kept == expected * (len(kept) // len(expected))
        if isinstance(policy, policies.ChannelPolicy):
            channels = [layer.kept_channels for layer in eviction.kept]
            assert [c[b].tolist() for c in channels] == think_channels(policy, sequence)

    # What the second turn computes, by a full cache, merged, with the rest masked.
    masks = {layer.layer_idx: kept_mask(layer.kept_indices, prompt_len) for layer in eviction.kept}
    with masked_reference(model, prompt_len, masks) as reference:
        if name in MERGES:
            for i, layer in enumerate(eviction.kept):
                own = [sequence[i] for sequence in stored]
                reference.stored[layer.layer_idx] = padded_batch(own, prompt_len)
        if isinstance(policy, policies.ChannelPolicy):
            reference.faded = {
                layer.layer_idx: faded_mask(layer, policy.num_recent, prompt_len, 16)
                for layer in eviction.kept
            }
        expected, _ = two_turns(model, inputs)
    if dtype == "float32":
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    else:
        # The second step follows the first's choice, which rounding may change.
        cosine = torch.cosine_similarity(actual[:, 0].float(), expected[:, 0].float(), dim=-1)
        assert (cosine > 0.99).all()
