"""Eviction methods as frozen dataclasses over a small base, and a registry of them by name."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from kvevict.policies.adakv import AdaKV
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
    SharingPolicy,
    compact_layers,
    select_layers,
)
from kvevict.policies.between import LayerPolicy, Shortening
from kvevict.policies.channels import ChannelPolicy
from kvevict.policies.chunkkv import ChunkKV
from kvevict.policies.corm import CORM
from kvevict.policies.d2o import D2O
from kvevict.policies.dbudgetkv import DBudgetKV
from kvevict.policies.decode import DecodePolicy, Victims
from kvevict.policies.engine import evict_prompt
from kvevict.policies.flashcache import FlashCache
from kvevict.policies.grounded import Grounded
from kvevict.policies.h2o import H2O
from kvevict.policies.hae import HAE
from kvevict.policies.keepkv import KeepKV
from kvevict.policies.keydiff import KeyDiff
from kvevict.policies.lightkv import LightKV
from kvevict.policies.lightkv_cache import LightKVCache
from kvevict.policies.look_m import LookM
from kvevict.policies.merging import Merged, MergingPolicy, merge_layers
from kvevict.policies.mixkv import MixKV
from kvevict.policies.prefixkv import PrefixKV
from kvevict.policies.pyramidkv import PyramidKV
from kvevict.policies.random import Random
from kvevict.policies.snapkv import SnapKV
from kvevict.policies.streaming_llm import StreamingLLM
from kvevict.policies.tgv_kv import TGVKV
from kvevict.policies.think import KeepAll, ThinK
from kvevict.policies.tova import TOVA
from kvevict.policies.vl_cache import VLCache
from kvevict.policies.zsmerge import ZSMerge

__all__ = [
    "AUDIO",
    "CORM",
    "D2O",
    "H2O",
    "HAE",
    "IMAGE",
    "TEXT",
    "TGVKV",
    "TOVA",
    "VIDEO",
    "AdaKV",
    "ChannelPolicy",
    "ChunkKV",
    "DBudgetKV",
    "DecodePolicy",
    "FlashCache",
    "Grounded",
    "KeepAll",
    "KeepKV",
    "KeyDiff",
    "LayerPolicy",
    "LayerScores",
    "LightKV",
    "LightKVCache",
    "LookM",
    "Merged",
    "MergingPolicy",
    "MixKV",
    "Policy",
    "PrefillPolicy",
    "PrefixKV",
    "Prompt",
    "PyramidKV",
    "Random",
    "Selection",
    "SharingPolicy",
    "Shortening",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "VLCache",
    "Victims",
    "ZSMerge",
    "compact_layers",
    "evict_prompt",
    "get",
    "list",
    "merge_layers",
    "select_layers",
]


def _mixkv(*, host: str = "snapkv", **fields: Any) -> MixKV:
    """Build MixKV over a host; fields that are not its own are the host's."""
    hosts: dict[str, type[SnapKV]] = {"adakv": AdaKV, "pyramidkv": PyramidKV, "snapkv": SnapKV}
    if host not in hosts:
        raise ValueError(
            f"kvevict.policies.get: host of mixkv must be one of {sorted(hosts)}, got {host!r}"
        )
    own = {name: fields.pop(name) for name in ("diversity_reference",) if name in fields}
    return MixKV(hosts[host](**fields), **own)


def _think(
    *, host: str | PrefillPolicy | None = None, keep: float | int | None = None, **fields: Any
) -> ThinK:
    """Build ThinK over a host; fields that are not its own are the host's."""
    own = {name: fields.pop(name) for name in ("ratio", "window", "num_recent") if name in fields}
    if not isinstance(host, str | None):
        if keep is not None or fields:
            raise ValueError(
                f"kvevict.policies.get: host of think has its own fields, got {host!r} and more"
            )
        return ThinK(host, **own)
    if keep is not None:
        fields["keep"] = keep
    if host is None and not fields:
        return ThinK(**own)
    hosts = [name for name in list(with_keep=True) if name != "think" and not _merges(name)]
    if host is not None and host not in hosts:
        raise ValueError(
            f"kvevict.policies.get: host of think must be one of {hosts}, got {host!r}"
        )
    build: Callable[..., Any] = _POLICIES[host or "snapkv"]
    return ThinK(build(**fields), **own)


# By the name of the module.
_POLICIES: dict[str, Callable[..., PrefillPolicy | LayerPolicy]] = {
    "adakv": AdaKV,
    "chunkkv": ChunkKV,
    "corm": CORM,
    "d2o": D2O,
    "dbudgetkv": DBudgetKV,
    "flashcache": FlashCache,
    "grounded": Grounded,
    "h2o": H2O,
    "hae": HAE,
    "keepkv": KeepKV,
    "keydiff": KeyDiff,
    "lightkv": LightKV,
    "lightkv_cache": LightKVCache,
    "look_m": LookM,
    "mixkv": _mixkv,
    "prefixkv": PrefixKV,
    "pyramidkv": PyramidKV,
    "random": Random,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
    "tgv_kv": TGVKV,
    "think": _think,
    "tova": TOVA,
    "vl_cache": VLCache,
    "zsmerge": ZSMerge,
}


# These have no budget: what they leave depends on the prompt alone.
_WITHOUT_KEEP = frozenset({"lightkv"})


def _merges(name: str) -> bool:
    build = _POLICIES[name]
    return isinstance(build, type) and issubclass(build, MergingPolicy)


def list(*, with_keep: bool = False) -> builtins.list[str]:
    """Return the names that `get` knows.

    Args:
        with_keep: only of policies that take a budget, `keep`.
    """
    return sorted(_POLICIES.keys() - _WITHOUT_KEEP if with_keep else _POLICIES)


def get(name: str, **fields: Any) -> PrefillPolicy | LayerPolicy:
    """Build a policy by name, e.g. `get("snapkv", keep=64, window=16)`.

    "mixkv" takes the name of its host and the host's fields: `get("mixkv", host="adakv", keep=64)`.
    So does "think", but for fields of that name in `ThinK`; it takes a policy as its host, too.
    Without a host's name its host is SnapKV; with neither that nor `keep`, every token stays.

    Raises:
        ValueError: if there is no policy of that name.
        TypeError: if it has no such field.
    """
    if name not in _POLICIES:
        raise ValueError(f"kvevict.policies.get: name must be one of {list()}, got {name!r}")
    return _POLICIES[name](**fields)
