"""Fused kernels that score, select and compact the KV cache of vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvevict._library import LibraryNotBuiltError, build_info
from kvevict.ops import (
    HeadReduction,
    Metric,
    Statistic,
    attention_lse,
    broadcast_indices,
    compact_kv_,
    gather_kv,
    match_tokens,
    merge_tokens_,
    score_and_compact,
    score_keys,
    score_keys_by_text,
    select_topk,
)
from kvevict.priority import build_priority

if TYPE_CHECKING:
    from kvevict.integrations.transformers import evict as evict

__version__: str = build_info()["version"]

__all__ = [
    "HeadReduction",
    "LibraryNotBuiltError",
    "Metric",
    "Statistic",
    "attention_lse",
    "broadcast_indices",
    "build_info",
    "build_priority",
    "compact_kv_",
    "gather_kv",
    "match_tokens",
    "merge_tokens_",
    "score_and_compact",
    "score_keys",
    "score_keys_by_text",
    "select_topk",
]


def __getattr__(name: str) -> Any:
    # Importing kvevict must not import transformers.
    if name == "evict":
        try:
            from kvevict.integrations.transformers import evict
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            message = "kvevict.evict needs transformers: pip install 'kvevict[transformers]'"
            raise ImportError(message) from error
        return evict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
