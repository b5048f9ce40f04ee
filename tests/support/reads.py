"""Tells what is read back to the host: on a GPU that would stall the queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
