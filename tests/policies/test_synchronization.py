"""A policy reads nothing back to the host per layer: on a GPU that would stall the queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.policies.cases import CASES, PROMPTS, make_layers, make_prompt

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Reads(TorchDispatchMode):
    """Collects the ops that read a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        masks = args[1] if name == "aten::index" else []
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if name in READS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_read_is_found() -> None:
    ones = torch.ones(3)
    with Reads() as reads:
        float(ones[0])
        ones[ones > 0]
        ones.nonzero()
    assert reads.found == ["aten::_local_scalar_dense", "aten::index", "aten::nonzero"]


@pytest.mark.parametrize("prompt_name", ["left_padded", "mixed", "no_vision"])
@pytest.mark.parametrize("case", CASES)
def test_no_read_per_layer(case: str, prompt_name: str) -> None:
    _, policy = CASES[case]
    prompt = make_prompt(*PROMPTS[prompt_name])
    row_index = policy.row_index(prompt)
    tensors = list(zip(*make_layers(prompt).values(), strict=True))
    # Once per prompt is fine: the first layer may.
    layers = [policy.observe(*tensors[0], prompt, row_index)]
    with Reads() as reads:
        layers += [policy.observe(*layer, prompt, row_index) for layer in tensors[1:]]
        layers = list(policy.revise(layers))
        for layer, budget in zip(layers, policy.budgets(layers), strict=True):
            policy.select(layer, budget, prompt.kv_len)
    assert reads.found == []
