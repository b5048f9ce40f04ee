"""Registration of fake kernels, typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[F], F]:
    """Registers the decorated function as the fake kernel of ``kvevict::<op>``."""
    decorate: Callable[[F], F] = torch.library.register_fake(f"kvevict::{op}")
    return decorate
