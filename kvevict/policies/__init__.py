"""Eviction methods as frozen dataclasses over a small base, and a registry of them by name."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from kvevict.policies.base import (
    AUDIO,
    IMAGE,
    TEXT,
    VIDEO,
    LayerScores,
    Policy,
    PrefillPolicy,
    Prompt,
    Selection,
    compact_layers,
    evict_prompt,
    select_layers,
)
from kvevict.policies.snapkv import SnapKV
from kvevict.policies.tgv_kv import TGVKV

__all__ = [
    "AUDIO",
    "IMAGE",
    "TEXT",
    "TGVKV",
    "VIDEO",
    "LayerScores",
    "Policy",
    "PrefillPolicy",
    "Prompt",
    "Selection",
    "SnapKV",
    "compact_layers",
    "evict_prompt",
    "get",
    "list",
    "select_layers",
]

_POLICIES: dict[str, Callable[..., PrefillPolicy]] = {"snapkv": SnapKV, "tgv_kv": TGVKV}


def list() -> builtins.list[str]:
    """Return the names that `get` knows."""
    return sorted(_POLICIES)


def get(name: str, **fields: Any) -> PrefillPolicy:
    """Build a policy by name, e.g. `get("snapkv", keep=64, window=16)`.

    Raises:
        ValueError: if there is no policy of that name.
        TypeError: if it has no such field.
    """
    if name not in _POLICIES:
        raise ValueError(f"kvevict.policies.get: name must be one of {list()}, got {name!r}")
    return _POLICIES[name](**fields)
