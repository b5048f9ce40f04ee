"""Where the ops can run: every test that takes `backend` runs once on each that is available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kvevict  # registers torch.ops.kvevict
from tests.emulation.library import load_ops

OPS = (
    "null",
    "accumulate_scores_",
    "attention_lse",
    "score_keys",
    "score_keys_by_text",
    "key_diversity",
    "mix_scores",
    "select_threshold",
    "select_topk",
    "broadcast_indices",
    "gather_kv",
    "compact_kv_",
    "evict_slots_",
    "rerotate_keys_",
    "match_tokens",
    "merge_tokens_",
    "score_and_compact",
)


def written_arguments(op: str) -> tuple[str, ...]:
    """Return the names of the arguments that an op writes."""
    arguments = getattr(torch.ops.kvevict, op).default._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


WRITING = tuple(op for op in OPS if written_arguments(op))


@dataclass(frozen=True)
class Backend:
    """One place to run an op: `namespace` is the one of torch.ops, inputs live on `device`."""

    name: str
    device: str
    namespace: str = "kvevict"

    def op(self, name: str) -> Callable[..., Any]:
        """Return torch.ops.<namespace>.<name>; skip the test if it has no CUDA kernel yet."""
        qualified = f"{self.namespace}::{name}"
        if not has_kernel(qualified, self.device):
            pytest.skip(f"{qualified} has no CUDA kernel")
        packet: Callable[..., Any] = getattr(getattr(torch.ops, self.namespace), name)
        return packet


def has_kernel(op: str, device: str) -> bool:
    """Return whether namespace::name is registered for tensors on a device."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper())
    except RuntimeError:  # no such op
        return False


CPU = Backend("cpu", "cpu")
EMULATED = Backend("emulated", "cpu", "kvevict_emulated")
CUDA = Backend("cuda", "cuda")


def available_backends() -> list[Backend]:
    """Return the backends of this machine and this build."""
    backends = [CPU]
    if load_ops():
        backends.append(EMULATED)
    if torch.cuda.is_available() and kvevict.build_info()["cuda_version"]:
        backends.append(CUDA)
    return backends
