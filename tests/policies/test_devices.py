"""Policies on tensors that hold no data: nothing is read back, nothing is put on another device.

On a GPU a read per layer would stall the queue, and a stray tensor of the CPU would raise.
"""

from __future__ import annotations

import pytest
import torch

from kvevict.policies import Prompt
from tests.policies.cases import CASES, NUM_KV_HEADS, NUM_QO_HEADS


@pytest.mark.parametrize("case", CASES)
def test_a_policy_neither_reads_nor_leaves_the_device(case: str) -> None:
    _, policy = CASES[case]
    with torch.device("meta"):
        modality = torch.zeros(2, 26, dtype=torch.int8)
        prompt = Prompt(modality, torch.ones(2, 26, dtype=torch.bool))
        rows = torch.zeros(2, 5, dtype=torch.int32)
        query = torch.zeros(2, NUM_QO_HEADS, 26, 8)
        key = torch.zeros(2, NUM_KV_HEADS, 26, 8)
    # Read once per prompt, not per layer.
    vars(prompt)["some_lack_trailing_text"] = True
    layers = [policy.observe(query, key, key.clone(), prompt, rows) for _ in range(3)]
    layers = policy.revise(layers)
    budgets = policy.budgets(layers)
    assert budgets.is_meta
    assert budgets.dtype == torch.int64
    for layer, budget in zip(layers, budgets, strict=True):
        kept_indices, kept_lens = policy.select(layer, budget, 20)
        assert kept_indices.is_meta
        assert kept_indices.shape == (2, layer.scores.shape[1], 20)
        assert kept_lens.shape == (2, layer.scores.shape[1])
