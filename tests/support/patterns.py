"""Adversarial scores by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, ...]


def _all_equal(shape: Shape) -> Tensor:
    return torch.full(shape, 0.25)


def _ascending(shape: Shape) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def _two_values(shape: Shape) -> Tensor:
    return torch.randint(0, 2, shape).float()


def _ties_at_pivot(shape: Shape) -> Tensor:
    """Return a few high, a few low and many equal scores: every k in between cuts through ties."""
    choice = torch.rand(shape)
    return torch.full(shape, 0.5).where(choice < 0.8, torch.randn(shape))


def _one_nan(shape: Shape) -> Tensor:
    scores = torch.randn(shape)
    scores[..., :1] = torch.nan
    return scores


def _all_nan(shape: Shape) -> Tensor:
    """Return NaN of several bit patterns; no pattern may make a difference."""
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1], dtype=torch.int32)
    return bits[torch.randint(0, len(bits), shape)].view(torch.float32)


def _inf(shape: Shape) -> Tensor:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, -3.4e38, 3.4e38])
    return special[torch.randint(0, len(special), shape)]


def _subnormal(shape: Shape) -> Tensor:
    """Return tiny numbers of both signs: flushed to zero they would all tie."""
    return torch.randint(-50, 50, shape) * torch.tensor(2.0**-149)


def _neg_zero(shape: Shape) -> Tensor:
    return torch.tensor([0.0, -0.0])[torch.randint(0, 2, shape)]


def _random(shape: Shape) -> Tensor:
    return torch.randn(shape)


PATTERNS: dict[str, Callable[[Shape], Tensor]] = {
    "all_equal": _all_equal,
    "ascending": _ascending,
    "two_values": _two_values,
    "ties_at_pivot": _ties_at_pivot,
    "one_nan": _one_nan,
    "all_nan": _all_nan,
    "inf": _inf,
    "subnormal": _subnormal,
    "neg_zero": _neg_zero,
    "random": _random,
}
