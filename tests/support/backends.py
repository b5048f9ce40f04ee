"""Where the ops can run: every test that takes `backend` runs once on each that is available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import kvevict  # registers torch.ops.kvevict

OPS = (
    "null",
    "attention_lse",
    "score_keys",
    "score_keys_by_text",
    "select_topk",
    "broadcast_indices",
    "gather_kv",
    "compact_kv_",
    "score_and_compact",
)


@dataclass(frozen=True)
class Backend:
    """One place to run an op: `namespace` is the one of torch.ops, inputs live on `device`."""

    name: str
    device: str
    namespace: str = "kvevict"

    def op(self, name: str) -> Callable[..., Any]:
        """Return torch.ops.<namespace>.<name>."""
        packet: Callable[..., Any] = getattr(getattr(torch.ops, self.namespace), name)
        return packet


CPU = Backend("cpu", "cpu")
EMULATED = Backend("emulated", "cpu", "kvevict_emulated")
CUDA = Backend("cuda", "cuda")


def available_backends() -> list[Backend]:
    """Return the backends of this machine and this build."""
    backends = [CPU]
    if hasattr(torch.ops.kvevict_emulated, "null"):
        backends.append(EMULATED)
    if torch.cuda.is_available() and kvevict.build_info()["cuda_version"]:
        backends.append(CUDA)
    return backends
