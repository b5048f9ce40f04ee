"""The template op: README, "Adding an op", starts here."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import Check
from kvevict.ops._fake import register_fake


def null(input: Tensor) -> Tensor:
    """Copies a tensor.

    Args:
        input: float32, any shape and strides.

    Returns:
        A new contiguous tensor with the same elements.

    Raises:
        ValueError: if ``input`` is not float32.

    O(numel) time, no extra memory.
    """
    output: Tensor = torch.ops.kvevict.null(input)
    return output


@register_fake("null")
def _(input: Tensor) -> Tensor:
    Check("null").dtype(input, "input", torch.float32)
    return torch.empty_like(input, memory_format=torch.contiguous_format)
