"""Fused kernels that score, select and compact the KV cache of vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvevict._library import LibraryNotBuiltError, build_info
from kvevict.ops import (
    DiversityReference,
    HeadReduction,
    Metric,
    Statistic,
    accumulate_scores_,
    attention_lse,
    broadcast_indices,
    compact_kv_,
    evict_slots_,
    gather_kv,
    key_diversity,
    match_tokens,
    merge_tokens_,
    mix_scores,
    rerotate_keys_,
    score_and_compact,
    score_keys,
    score_keys_by_text,
    select_threshold,
    select_topk,
)
from kvevict.priority import build_priority

if TYPE_CHECKING:
    from kvevict.integrations.transformers import evict as evict
    from kvevict.integrations.transformers import report as report

__version__: str = build_info()["version"]

__all__ = [
    "DiversityReference",
    "HeadReduction",
    "LibraryNotBuiltError",
    "Metric",
    "Statistic",
    "accumulate_scores_",
    "attention_lse",
    "broadcast_indices",
    "build_info",
    "build_priority",
    "compact_kv_",
    "evict_slots_",
    "gather_kv",
    "key_diversity",
    "match_tokens",
    "merge_tokens_",
    "mix_scores",
    "rerotate_keys_",
    "score_and_compact",
    "score_keys",
    "score_keys_by_text",
    "select_threshold",
    "select_topk",
]


def __getattr__(name: str) -> Any:
    # Importing kvevict must not import transformers.
    if name in ("evict", "report"):
        try:
            from kvevict.integrations import transformers as integration
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            message = f"kvevict.{name} needs transformers: pip install 'kvevict[transformers]'"
            raise ImportError(message) from error
        return getattr(integration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
