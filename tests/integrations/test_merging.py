"""Merged keys in the caches of tiny models: weights in attention, later turns, batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvevict
from kvevict.integrations.transformers.attention import attend_blocks
from kvevict.policies import D2O, H2O, KeepKV, LookM, ZSMerge
from kvevict.slots import Slots
from tests.integrations.runs import assert_beams_stand_alone, find_reads_of_a_step
from tests.integrations.test_decoding import converse
from tests.integrations.tiny_models import (
    LONG_ROW,
    ONE_IMAGE,
    TWO_IMAGES,
    generate,
    get_model,
    make_inputs,
    row_of,
)

ROWS = [ONE_IMAGE, TWO_IMAGES, LONG_ROW]
POLICIES: dict[str, Any] = {
    "d2o": D2O(keep=0.6),
    "keepkv": KeepKV(keep=0.4, window=8, similarity=0.2),
    "look_m": LookM(keep=0.4),
    "zsmerge": ZSMerge(keep=0.4, num_residual=2),
}


def test_a_key_of_weight_n_is_n_keys() -> None:
    """Whatever masks it; on SDPA itself."""
    weight = torch.tensor([[[3.0, 1, 2, 1, 4, 1]], [[1.0, 2, 1, 1, 1, 5]]])
    visible = torch.tensor([[[1, 1, 0, 1, 1, 1]], [[1, 1, 1, 1, 0, 1]]]).bool()
    query = torch.randn(2, 4, 3, 8)
    keys, values = torch.randn(2, 2, 2, 6, 8)
    tags = torch.zeros(2, 1, 6, 3, dtype=torch.int32)
    padding = torch.zeros(2, dtype=torch.int32)
    slots = Slots(keys, values, tags, seen_len=6, padding_lens=padding, has_empty=False)
    slots.weigh(weight)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, m, enable_gqa=True).transpose(1, 2)

    for mask in (None, visible):
        bias = slots.biased(mask)
        for qo_len in (1, 3):
            actual = attend_blocks(sdpa, query[:, :, :qo_len], keys, values, bias)
            for b in range(2):
                copies = [int(w) for w in weight[b, 0]]
                index = [j for j in range(6) for _ in range(copies[j]) if visible[b, 0, j]]
                if mask is None:
                    index = [j for j in range(6) for _ in range(copies[j])]
                # Only the last row sees all keys.
                row = query[b : b + 1, :, qo_len - 1 : qo_len]
                expected = sdpa(row, keys[b : b + 1, :, index], values[b : b + 1, :, index], None)
                torch.testing.assert_close(actual[b : b + 1, -1:], expected)


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize("policy_name", POLICIES)
def test_turns_of_a_padded_batch(policy_name: str, every_turn: bool) -> None:
    """Steps, a question, steps: as each row alone."""
    model, policy = get_model("llava"), POLICIES[policy_name]
    inputs = make_inputs(model, ROWS)
    turns = [1, 1, 7, 1, 1]
    with kvevict.evict(model, policy, every_turn=every_turn) as eviction:
        together, cached = converse(model, inputs, turns)
    assert len(eviction.reports) == 1 + every_turn
    totals = inputs["attention_mask"].sum(1) + sum(turns)
    for layer in cached.layers:
        weight = layer.store.slots.key_weight
        assert (weight is None) == (policy_name in ("look_m", "d2o"))
        if policy_name == "zsmerge":
            # No token is lost.
            weight = weight.masked_fill(layer.store.slots.columns < 0, 0)
            assert torch.equal(weight.sum(-1), totals[:, None].expand(-1, 2).float())
    for b in range(len(ROWS)):
        generator = torch.Generator().manual_seed(3)
        # The same tokens as in the batch.
        ids = [torch.randint(10, 90, (len(ROWS), n), generator=generator)[b : b + 1] for n in turns]
        with kvevict.evict(model, policy, every_turn=every_turn), torch.no_grad():
            cached = model(**row_of(model, inputs, ROWS, b)).past_key_values
            logits = [model(input_ids=i, past_key_values=cached).logits for i in ids]
        torch.testing.assert_close(together[b], torch.cat(logits, 1)[0], rtol=0, atol=1e-4)


def test_another_policy_carries_the_weights_on() -> None:
    """What ZSMerge has merged counts for as much after a turn of SnapKV."""
    model = get_model("llama")
    inputs = make_inputs(model, [LONG_ROW])
    with kvevict.evict(model, ZSMerge(keep=20, num_residual=3)), torch.no_grad():
        cached = model(**inputs).past_key_values
    before = cached.layers[0].store.slots
    question = torch.arange(20, 26)[None]
    snapkv = kvevict.policies.SnapKV(keep=18, window=4)
    with kvevict.evict(model, snapkv, every_turn=True), torch.no_grad():
        model(input_ids=question, past_key_values=cached)
    after = cached.layers[0].store.slots
    assert after.key_weight.shape == (1, 2, 18)
    for head in range(2):
        weight_of = dict(
            zip(before.columns[0, head].tolist(), before.key_weight[0, head].tolist(), strict=True)
        )
        for column, weight in zip(
            after.columns[0, head].tolist(), after.key_weight[0, head].tolist(), strict=True
        ):
            assert weight == weight_of.get(column, 1)


@pytest.mark.parametrize(
    "policy", [D2O(keep=9), H2O(keep=9), KeepKV(keep=9), ZSMerge(keep=9)], ids=str
)
def test_decoding_outside_of_no_grad(policy: Any) -> None:
    """The keys of a prompt may be part of a graph; what is kept and remembered is not."""
    model = get_model("llama")
    with kvevict.evict(model, policy):
        cached = model(**make_inputs(model, [LONG_ROW])).past_key_values
        for _ in range(2):
            model(input_ids=torch.tensor([[20]]), past_key_values=cached)
    for layer in cached.layers:
        slots = layer.store.slots
        assert slots.stored == 9
        memory = [value for value in slots.memory.values() if isinstance(value, Tensor)]
        assert not any(t.requires_grad for t in (slots.keys, slots.scores, *memory))


@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_step_reads_nothing_back(policy_name: str) -> None:
    """On a GPU a read would stall the queue; a padded batch, with merges in every step."""
    model = get_model("llava")
    inputs = make_inputs(model, ROWS)
    assert find_reads_of_a_step(model, POLICIES[policy_name], inputs) == []


@pytest.mark.parametrize("policy_name", ["d2o", "keepkv", "zsmerge"])
def test_beam_search(policy_name: str) -> None:
    """Beams take their merged keys, weights and averages along: each as a run of its own tokens."""
    model, policy = get_model("llava"), POLICIES[policy_name]
    inputs = make_inputs(model, [ONE_IMAGE])
    assert_beams_stand_alone(model, policy, inputs, num_new=6, num_beams=2)


def test_merging_in_bfloat16() -> None:
    """The cache keeps its dtype and its length; weights stay float32."""
    model = copy.deepcopy(get_model("llama")).bfloat16()
    for policy in POLICIES.values():
        with kvevict.evict(model, policy):
            cached = generate(model, make_inputs(model, [LONG_ROW]), num_new=5).past_key_values
        for layer in cached.layers:
            assert layer.dtype == torch.bfloat16
            assert layer.store.slots.keys.isfinite().all()
            weight = layer.store.slots.key_weight
            assert weight is None or weight.dtype == torch.float32
