"""`kvevict.build_priority`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvevict import build_priority

KEY_MASK = torch.tensor(
    [[False, True, True, True, True, True], [True, True, True, False, True, False]]
)


def test_classes() -> None:
    preferred = torch.tensor([[True, True, True, True, False, False]] * 2)
    priority = build_priority(KEY_MASK, num_sink=1, num_recent=2, preferred=preferred)
    assert priority.dtype == torch.uint8
    assert priority.tolist() == [[0, 3, 2, 2, 3, 3], [3, 2, 3, 0, 3, 0]]
    assert build_priority(KEY_MASK).tolist() == KEY_MASK.int().tolist()


def test_a_number_per_sequence() -> None:
    num_sink, num_recent = torch.tensor([2, 0]), torch.tensor([0, 9])
    priority = build_priority(KEY_MASK, num_sink=num_sink, num_recent=num_recent)
    assert priority.tolist() == [[0, 3, 3, 1, 1, 1], [3, 3, 3, 0, 3, 0]]
    assert build_priority(KEY_MASK, num_sink=-num_sink).tolist() == KEY_MASK.int().tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_mask": KEY_MASK.int()}, "key_mask must be bool of rank 2, got torch.int32"),
        ({"key_mask": KEY_MASK[0]}, "key_mask must be bool of rank 2"),
        ({"num_sink": -1}, "num_sink must be at least 0, got -1"),
        ({"num_recent": -2}, "num_recent must be at least 0, got -2"),
        ({"num_sink": torch.zeros(3)}, r"num_sink must have shape \(2,\), got \(3,\)"),
        ({"num_recent": torch.zeros(2, 1)}, r"num_recent must have shape \(2,\), got \(2, 1\)"),
        ({"preferred": KEY_MASK[:1]}, r"preferred must have shape \(2, 6\), got \(1, 6\)"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_priority(**{"key_mask": KEY_MASK, **arguments})
