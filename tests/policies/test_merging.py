"""Methods that merge: worked examples, what merging must not change, weights of keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict import policies
from kvevict.ops.enums import HeadReduction
from kvevict.policies import (
    D2O,
    KeepKV,
    LayerScores,
    LightKVCache,
    LookM,
    MergingPolicy,
    ZSMerge,
    merge_layers,
)
from kvevict.policies._weighted import score_weighted
from kvevict.policies.d2o import _unevenness
from kvevict.reference import score_keys
from tests.policies.cases import CASES, PROMPTS, kept_lists, make_layers, make_prompt
from tests.policies.merge_oracles import MERGES

MERGING = [case for case, (name, _) in CASES.items() if name in MERGES]


def on_axes(*rows: tuple[float, float]) -> Tensor:
    """Return states of one head on the first two axes."""
    states = torch.zeros(1, 1, len(rows), 8)
    states[0, 0, :, :2] = torch.tensor(rows)
    return states


# Worked examples


@pytest.mark.parametrize(
    ("merging", "key", "value"),
    [
        # Targets: 0 of 2 and 4 (cosines 3 / sqrt(10) and 1), 1 of 3 (3 / sqrt(10)).
        ("pivot", [(4, 1 / 6), (0.25, 2.25), (0, 4)], [2, 2.5, 6]),
        ("average", [(4, 1 / 3), (0.5, 2.5), (0, 4)], [3, 3, 6]),
        ("weighted", [(3.948683, 0.316228), (0.474342, 2.423025), (0, 4)], [2.948683, 2.897367, 6]),
    ],
)
def test_look_m(merging: Any, key: Any, value: Any) -> None:
    """Text 0, 1 and 5 stays, whatever its scores; vision 2, 3 and 4 is merged into it."""
    policy = LookM(keep=3, num_sink=1, recent_share=0.4, merging=merging)
    keys, values, selections = policies.evict_prompt(
        policy,
        [torch.zeros(1, 1, 6, 8)],
        [on_axes((4, 0), (0, 2), (3, 1), (1, 3), (5, 0), (0, 4))],
        [on_axes(*((j, 0) for j in range(1, 7)))],
        make_prompt("ttiiit"),
    )
    assert selections is not None
    assert kept_lists(selections[0]) == [[[0, 1, 5]]]
    assert selections[0].key_weight is None
    expected = torch.tensor(key, dtype=torch.float32)
    torch.testing.assert_close(keys[0][0, 0, :, :2], expected, rtol=0, atol=1e-6)
    assert values[0][0, 0, :, 0].tolist() == pytest.approx(value, abs=1e-6)


def test_d2o_budgets() -> None:
    """Whole layers are paid for; the others share by exp(-v)."""
    prompt = make_prompt("t" * 100)

    def budgets(keep: float, *masses: float) -> Any:
        layers = [LayerScores(torch.zeros(1, 2, 100), prompt, torch.tensor([m])) for m in masses]
        return D2O(keep=keep).budgets(layers)[:, 0].tolist()

    # 8 * 80 - 300 for five layers of equal weight; the masses of whole layers do not matter.
    assert budgets(0.8, 9, 9, 0.5, 0.5, 0.5, 0.5, 0.5, 9) == [100, 100, 68, 68, 68, 68, 68, 100]
    # exp(-ln 2) is a half: 75 and its half of 8 * 75 - 300.
    ln2 = 0.69314718
    assert budgets(0.75, 0, 0, ln2, ln2, 0, 0, 0, 0) == [100, 100, 37, 37, 75, 75, 75, 100]
    # Half of 5 * 30 for three layers, the rest for two.
    assert budgets(0.3, 0, 0, 0.2, 0.2, 0) == [25, 25, 37, 37, 25]
    # One cannot use 180 of 8 * 90 - 300.
    ln3 = 1.0986123
    assert budgets(0.9, 0, 0, 0, ln3, ln3, ln3, ln3, 0) == [100, 100, 100, 80, 80, 80, 80, 100]
    assert budgets(0.3, 1, 2, 3) == [30, 30, 30]
    assert budgets(1.0, 0, 0, 0.5, 0, 0) == [100] * 5


def test_d2o_unevenness() -> None:
    """Variances of 1, 0 and 4 are a quarter, nothing and one; padding does not count."""
    sums = torch.tensor([[[9.0, 1, 2, 3], [9, 2, 2, 2], [9, 0, 2, 4]]])
    mass = _unevenness(sums, make_prompt(".ttt"))
    assert mass.tolist() == pytest.approx([1.25 / 3], abs=1e-6)


@pytest.mark.parametrize(
    ("merging", "value"),
    [
        # 2 and 4 go to 0 (cosines 0.8 and 1); 3 resembles 1 by 5 / 13, below the mean.
        ("released", [(1 + 0.8 * 3 + 5) / 3, 2]),
        ("exponential", [(2.7182818 * (1 + 5) + 2.2255409 * 3) / (2 * 2.7182818 + 2.2255409), 2]),
    ],
)
def test_d2o(merging: Any, value: Any) -> None:
    policy = D2O(keep=3, num_sink=2, recent_share=0.4, merging=merging)
    query, key = torch.zeros(1, 1, 6, 8), on_axes((4, 0), (0, 2), (4, 3), (-12, 5), (5, 0), (0, -4))
    _, values, selections = policies.evict_prompt(
        policy,
        [query],
        [key],
        [on_axes(*((j, 0) for j in range(1, 7)))],
        make_prompt("tttttt"),
    )
    assert selections is not None
    assert kept_lists(selections[0]) == [[[0, 1, 5]]]
    assert values[0][0, 0, :, 0].tolist() == pytest.approx([*value, 6], abs=1e-6)


def test_lightkv_cache() -> None:
    """Eight vision tokens in one window; of the pairs 3 and 6, 5 and 2 are the most similar."""
    states = on_axes(
        *((1, 1), (1, 0), (2, 1), (0, 1), (1, 2), (3, 1), (0, 2), (-1, 1), (2, 2), (5, -1))
    )
    # Attention of the last row, a multiple of what each key weighs.
    query = torch.zeros(1, 1, 10, 8)
    query[..., 9, 2] = 1
    omega = torch.tensor([2.0, 3, 3, 2, 4, 4, 2, 3, 3, 2])
    key = states.clone()
    key[0, 0, :, 2] = omega.log()
    policy = LightKVCache(keep=8, num_sink=0, windows=(1,))
    layer = policy.observe(query, key, states, make_prompt("tiiiiiiiit"), None, sm_scale=1.0)
    torch.testing.assert_close(layer.scores[0, 0], omega / omega.sum())
    assert torch.equal(key[..., :2], states[..., :2])
    keys, values, selections = policies.evict_prompt(
        policy, [query], [key], [states], make_prompt("tiiiiiiiit"), sm_scale=1.0
    )
    assert selections is not None
    assert kept_lists(selections[0]) == [[[0, 1, 2, 4, 6, 7, 8, 9]]]
    assert values[0][0, 0, 2, :2].tolist() == pytest.approx([(3 * 2 + 4 * 3) / 7, 1])
    assert values[0][0, 0, 4, :2].tolist() == pytest.approx([0, 1.5])
    assert keys[0][0, 0, 2, :2].tolist() == pytest.approx([(3 * 2 + 4 * 3) / 7, 1])


def test_zsmerge() -> None:
    """Uniform attention: early keys win. 7 keys are left over for two residual slots."""
    policy = ZSMerge(keep=6, num_sink=1, num_residual=2, decay=0.5)
    row = "iiiiiiiiiii"
    keys, values, selections = policies.evict_prompt(
        policy,
        [torch.zeros(1, 1, 11, 8)],
        [on_axes(*((j, 1) for j in range(11)))],
        [on_axes(*((j * j, 2) for j in range(11)))],
        make_prompt(row),
    )
    assert selections is not None
    # Four for themselves: sink 0, tail 9 and 10, and 1. Left over: 2 3 4 5 | 6 7 8.
    assert kept_lists(selections[0]) == [[[0, 1, 2, 6, 9, 10]]]
    assert keys[0][0, 0, :, 0].tolist() == pytest.approx([0, 1, 3.5, 7, 9, 10])
    assert values[0][0, 0, :, 0].tolist() == pytest.approx([0, 1, 13.5, 149 / 3, 81, 100])
    assert selections[0].key_weight is not None
    assert selections[0].key_weight.tolist() == [[[1, 1, 4, 3, 1, 1]]]


def test_keepkv() -> None:
    """Logits ln 3 and ln 6, of one token each: E = 3 and 6, lambda = ln 4.5 / (3 ln 3 + 6 ln 6)."""
    policy = KeepKV(keep=2, num_sink=0, window=1, similarity=0.9)
    three, six = 1.0986123, 1.7917595
    query = torch.zeros(1, 1, 4, 8)
    query[0, 0, 3, 0] = 1
    keys, values, selections = policies.evict_prompt(
        policy,
        [query],
        [on_axes((three, 0.4), (0, -2), (six, 0.5), (0, 1))],
        [on_axes((1, 0), (9, 9), (4, 0), (0, 7))],
        make_prompt("tttt"),
        sm_scale=1.0,
    )
    assert selections is not None
    # 0 goes to 2; 1 resembles nothing.
    assert kept_lists(selections[0]) == [[[2, 3]]]
    assert selections[0].key_weight is not None
    assert selections[0].key_weight.tolist() == [[[2, 1]]]
    factor = 1.5040774 / (3 * three + 6 * six)
    expected = [factor * (3 * three + 6 * six), factor * (3 * 0.4 + 6 * 0.5)]
    assert keys[0][0, 0, 0, :2].tolist() == pytest.approx(expected, rel=1e-5)
    assert values[0][0, 0, 0, :2].tolist() == pytest.approx([3, 0])
    # The output of the query: 3 * 1 + 6 * 4 over 3 + 6 and the logits of 3.
    assert 2 * 2.718281828 ** expected[0] == pytest.approx(9, rel=1e-5)


# What merging leaves as it was


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_keepkv_leaves_the_output_of_the_last_query(scale: float, decay: float) -> None:
    """Also where lambda is unusable: small logits of either sign."""
    row = "tttttiiiiiiiiiiiiiiitttttt"
    prompt = make_prompt(row)
    query, key, value = torch.randn(3, 1, 3, len(row), 8)
    query = query * scale
    policy = KeepKV(keep=8, window=1 if decay else 9, decay=decay, similarity=-1.0)
    keys, values, selections = policies.evict_prompt(policy, [query], [key], [value], prompt)
    assert selections is not None
    weights = selections[0].key_weight
    assert weights is not None

    def output(k: Tensor, v: Tensor, bias: Tensor | float) -> Tensor:
        logits = query[:, :, -1:].double() @ k.double().mT / 8**0.5 + bias
        return logits.softmax(-1) @ v.double()

    before = output(key, value, 0.0)
    after = output(keys[0], values[0], weights.double().log()[:, :, None])
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)
    # Votes are tokens, but for keys that lambda would have stretched or turned.
    assert (weights.frac() == 0).any()
    assert (weights.frac() != 0).any()


# The others decide by position, or when the layer was observed.
BY_SIMILARITY = [case for case in MERGING if CASES[case][0] not in ("zsmerge", "lightkv_cache")]


@pytest.mark.parametrize("case", BY_SIMILARITY)
def test_keys_with_nan_are_dropped_not_merged(case: str) -> None:
    _, policy = CASES[case]
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    scores = [
        policy.observe(q, k, v, prompt, policy.row_index(prompt))
        for q, k, v in zip(*layers.values(), strict=True)
    ]
    selections = policies.select_layers(policy, scores)
    assert selections is not None
    keys, values = [k.clone() for k in layers["keys"]], [v.clone() for v in layers["values"]]
    for key, selection in zip(keys, selections, strict=True):
        kept = selection.kept_indices[0, 0].tolist()
        gone = next(j for j in range(6, prompt.kv_len) if j not in kept)
        key[0, 0, gone] = torch.nan
    _, merged = merge_layers(policy, keys, values, scores, selections)
    new = policies.compact_layers(keys, values, merged)
    for tensors in (*new, [s.key_weight for s in merged]):
        for tensor in tensors:
            assert tensor is None or tensor.isfinite().all()


@pytest.mark.parametrize("case", MERGING)
def test_padding_is_not_merged(case: str) -> None:
    """Whatever it holds."""
    _, policy = CASES[case]
    assert isinstance(policy, MergingPolicy)
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    results = []
    for filler in (0.0, torch.nan):
        for tensors in (layers["keys"], layers["values"]):
            for tensor in tensors:
                tensor.transpose(1, 2)[~prompt.valid] = filler
        results.append(policies.evict_prompt(policy, prompt=prompt, **layers))
    for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", MERGING)
def test_heads_and_sequences_are_merged_for_themselves(case: str) -> None:
    _, policy = CASES[case]
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    keys, values, _ = policies.evict_prompt(policy, prompt=prompt, **layers)
    across = {name: [t.roll(t.shape[1] // 2, 1) for t in ts] for name, ts in layers.items()}
    rolled = policies.evict_prompt(policy, prompt=prompt, **across)
    for ours, theirs in zip(rolled[:2], (keys, values), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # Means over all heads are summed in another order.
            atol = 1e-6 if getattr(policy, "head_reduction", None) == HeadReduction.ALL_MEAN else 0
            torch.testing.assert_close(a, b.roll(1, 1), rtol=0, atol=atol)
    assert prompt.key_mask is not None
    flipped = replace(prompt, modality=prompt.modality.flip(0), key_mask=prompt.key_mask.flip(0))
    backwards = {name: [t.flip(0) for t in ts] for name, ts in layers.items()}
    turned = policies.evict_prompt(policy, prompt=flipped, **backwards)
    for ours, theirs in zip(turned[:2], (keys, values), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b.flip(0))


# Keys that count for several tokens


def test_a_key_of_weight_n_scores_as_n_keys() -> None:
    batch_size, kv_len, qo_len = 2, 9, 4
    query = torch.randn(batch_size, 4, qo_len, 8)
    key = torch.randn(batch_size, 2, kv_len, 8)
    weight = torch.randint(1, 5, (batch_size, 2, kv_len)).float()
    mask = torch.ones(batch_size, 1, kv_len, dtype=torch.bool)
    mask[1, :, :3] = mask[1, :, 7] = False
    # The rows that vote stand at keys of their own.
    weight[..., kv_len - qo_len :] = 1
    row_index = torch.tensor([[0, 2, 3], [1, 3, -1]], dtype=torch.int32)
    row_weight = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.3, 1.0]])
    options: dict[str, Any] = {"row_index": row_index, "row_weight": row_weight, "sm_scale": 0.4}
    actual = score_weighted(query, key, weight, key_mask=mask, **options)
    for b in range(batch_size):
        for head in range(2):
            copies = weight[b, head].int()
            index = torch.arange(kv_len).repeat_interleave(copies)
            expected = score_keys(
                query[b : b + 1, 2 * head : 2 * head + 2],
                key[b : b + 1, head : head + 1, index],
                row_index=row_index[b : b + 1],
                row_weight=row_weight[b : b + 1],
                key_mask=mask[b, :, index],
                sm_scale=0.4,
                head_reduction=HeadReduction.GROUP_MEAN,
            )
            summed = torch.zeros(kv_len, dtype=torch.float64).index_add_(0, index, expected[0, 0])
            torch.testing.assert_close(actual[b, head].double(), summed, rtol=1e-5, atol=1e-6)


def test_padding_does_not_enter_weighted_attention() -> None:
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    key[0, :, :3] = torch.nan
    scores = score_weighted(query, key, torch.ones(2, 2, 9), key_mask=mask[:, None])
    expected = score_keys(query, key, key_mask=mask, head_reduction=HeadReduction.GROUP_MEAN)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


def test_padding_behind_the_prompt_is_not_in_keepkvs_query() -> None:
    prompt = make_prompt("ttiitt..")
    query, key, value = torch.randn(3, 1, 1, 8, 8)
    for tensor in (query, key, value):
        tensor[:, :, 6:] = torch.nan
    policy = KeepKV(keep=4, window=8, similarity=-1.0)
    layer = policy.observe(query, key, value, prompt, policy.row_index(prompt))
    (selection,) = policies.select_layers(policy, [layer]) or ()
    weights = policy.merge(key, value, layer, selection).key_weight
    assert weights is not None
    assert weights[..., :6].isfinite().all()
    with pytest.raises(ValueError, match=r"similarity must be in \[-1, 1\]"):
        KeepKV(keep=4, similarity="high")  # type: ignore[arg-type]
