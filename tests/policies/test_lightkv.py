"""LightKV: the worked example, and merging by loops over Python lists in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvevict.policies import LayerPolicy, LightKV
from kvevict.policies.lightkv import plan_windows
from tests.policies.cases import kept_lists, make_prompt
from tests.policies.merging import merge_by_loops


def test_worked_example() -> None:
    x = [(1, 1), (1, 0), (2, 1), (0, 1), (1, 2), (3, 1), (0, 2), (-1, 1), (2, 2), (5, -1)]
    hidden = torch.zeros(1, 10, 8)
    hidden[0, :, :2] = torch.tensor(x)
    query, key = torch.zeros(2, 1, 1, 10, 8)
    query[0, 0, :, 0] = torch.tensor([1, 1, 2, 1, 1, 3, 1, 2, 1, 1.0]).log()
    query[0, 0, :, 1] = torch.tensor([1, 2, 1, 1, 3, 1, 1, 1, 2, 1.0]).log()
    key[0, 0, 0, 0] = key[0, 0, 9, 1] = 1
    prompt = make_prompt("tiiiiiiiit")
    policy = LightKV(merge_layers=(3,), windows=(1,), drop=(0.25,))
    weight = policy.weigh(query, key, prompt, 1.0)
    expected = torch.tensor([2, 3, 3, 2, 4, 4, 2, 3, 3, 2]) / 14
    torch.testing.assert_close(weight[0, 0], expected)
    result = policy.shorten(hidden, query, key, prompt, stage=0, sm_scale=1.0)
    assert result is not None
    assert kept_lists(result.selection) == [[[0, 1, 2, 4, 6, 7, 8, 9]]]
    assert result.hidden_states is not None
    assert result.hidden_states[0, 2, :2].tolist() == pytest.approx([2.571429, 1])
    assert result.hidden_states[0, 6, :2].tolist() == pytest.approx([0, 1.5])
    untouched = [0, 1, 4, 7, 8, 9]
    assert torch.equal(result.hidden_states[0, untouched], hidden[0, untouched])
    assert torch.equal(hidden[0, :, :2], torch.tensor(x).float())


def test_counts_of_the_released_schedules() -> None:
    """576 tokens under windows 4-2-1 become 288, 145 and 73; so for other sizes."""
    for windows, counts in (
        ((4, 2, 1), (576, 288, 145, 73)),
        ((4, 2, 1), (2880, 1441, 722, 361)),
        ((6, 4, 2), (1024, 520, 260, 131)),
    ):
        for window, before, after in zip(windows, counts[:-1], counts[1:], strict=True):
            plan = plan_windows(make_prompt("tt" + "i" * before + "ttt"), window, 0.5)
            is_first = (plan.rank == 0) & (plan.position >= 0)
            assert before - int(plan.num_dropped[is_first].sum()) == after


ROWS = {
    "one_image": ["ttt" + "i" * 36 + "tttt"],
    "two_sizes": ["t" + "i" * 33 + "tt" + "i" * 50 + "t" + "v" * 40],
    "padded": [
        "." * 9 + "tt" + "i" * 64 + "ttt",
        "i" * 37 + "t" * 5 + "i" * 36,
        "." * 20 + "t" * 58,
        "." * 30 + "ttt" + "i" * 31 + "t" * 14,
    ],
}


@pytest.mark.parametrize(
    ("fields"),
    [
        {"windows": (2,)},
        {"windows": (1,), "drop": (0.3,)},
        {"windows": (2,), "drop": (1.0,), "guidance": "uniform"},
        {"windows": (1,), "drop": (0.0,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows_name", ROWS)
def test_merging_equals_the_loops(rows_name: str, fields: dict[str, Any]) -> None:
    rows = ROWS[rows_name]
    prompt = make_prompt(*rows)
    batch_size, kv_len = prompt.modality.shape
    hidden = torch.randn(batch_size, kv_len, 16)
    query, key = torch.randn(batch_size, 4, kv_len, 8) * 2, torch.randn(batch_size, 2, kv_len, 8)
    policy = LightKV(merge_layers=(1,), **{"drop": (0.5,), **fields})
    assert isinstance(policy, LayerPolicy)
    result = policy.shorten(hidden, query, key, prompt, stage=0)
    changed = []
    for b, row in enumerate(rows):
        padding = row.count(".")
        own = (hidden[b, padding:], query[b, :, padding:], key[b, :, padding:])
        kept, merged = merge_by_loops(*own, row[padding:], policy, 0)
        changed.append(len(kept) < len(row) - padding)
        if result is None:
            assert not changed[-1]
            continue
        assert [j - padding for j in kept_lists(result.selection)[b][0]] == kept
        assert result.hidden_states is not None
        ours = result.hidden_states[b, padding:].double()
        torch.testing.assert_close(ours[kept], merged[kept], rtol=1e-5, atol=1e-5)
        assert result.restarted is not None
        assert result.restarted.tolist()[b] == changed[-1]
    assert (result is None) == (fields.get("drop") == (0.0,))
    if rows_name == "padded" and result is not None:
        assert changed == [True, True, False, fields["windows"] == (1,)]


def test_without_text_the_mean_is_plain() -> None:
    prompt = make_prompt("i" * 40)
    hidden, query, key = torch.randn(1, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8)
    policies = [LightKV((0,), (1,), (0.5,), guidance=g) for g in ("text", "uniform")]  # type: ignore[arg-type]
    results = [p.shorten(hidden, query, key, prompt, stage=0) for p in policies]
    assert results[0] is not None
    assert results[1] is not None
    assert torch.equal(results[0].selection.kept_indices, results[1].selection.kept_indices)
    torch.testing.assert_close(results[0].hidden_states, results[1].hidden_states)


def test_equal_and_unordered_similarities() -> None:
    """The lower position is merged first; NaN last."""
    prompt = make_prompt("t" + "i" * 16 + "t")
    hidden = torch.ones(1, 18, 8)
    hidden[0, 3] = torch.nan
    query = key = torch.zeros(1, 1, 18, 8)
    policy = LightKV((0,), (1,), (0.25,))
    result = policy.shorten(hidden, query, key, prompt, stage=0)
    assert result is not None
    gone = {*range(18)} - {*kept_lists(result.selection)[0][0]}
    assert gone == {1, 5, 7, 9}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_layers": ()}, "merge_layers must be ints that ascend from at least 0"),
        ({"merge_layers": (3, 2, 5)}, "merge_layers must be ints that ascend from at least 0"),
        ({"merge_layers": (-1, 2, 5)}, "merge_layers must be ints that ascend from at least 0"),
        ({"merge_layers": (1.5,)}, "merge_layers must be ints that ascend from at least 0"),
        ({"merge_layers": 12}, "merge_layers must be a tuple"),
        ({"windows": 1}, "windows must be a tuple"),
        ({"drop": 0.5}, "drop must be a tuple"),
        ({"windows": (4, 2)}, "windows must have 1 or 3 values"),
        ({"windows": (4, 2, 0)}, "windows must be ints of at least 1"),
        ({"drop": (1.5,)}, r"drop must be in \[0, 1\]"),
        ({"guidance": "image"}, "guidance must be 'text' or 'uniform'"),
        ({"decode_positions": 1}, "decode_positions must be 'conversation' or 'stored'"),
    ],
)
def test_refused_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightKV(**fields)


def test_layers_that_the_model_does_not_have() -> None:
    assert LightKV().shortening_layers(32) == (12, 18, 24)
    assert LightKV().shortening_layers(28) == (10, 15, 21)
    assert LightKV().shortening_layers(4) == (1, 2, 3)
    assert LightKV((0, 3), (1,), (0.5,)).shortening_layers(4) == (0, 3)
    with pytest.raises(ValueError, match=r"must be different layers below 3, .* got \(1, 1, 2\)"):
        LightKV().shortening_layers(3)
    with pytest.raises(ValueError, match="must be different layers below 24"):
        LightKV((12, 18, 24)).shortening_layers(24)
