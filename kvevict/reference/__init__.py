"""Float64 oracles: every op again in plain torch, readable before fast.

An oracle has the name, the parameters and the defaults of its op. Floating results are float64,
indices int32. Arguments are not checked; what an op refuses is undefined here.
"""

from __future__ import annotations

from kvevict.reference.accumulate_scores import accumulate_scores_
from kvevict.reference.attention_lse import attention_lse
from kvevict.reference.broadcast_indices import broadcast_indices
from kvevict.reference.compact_kv import compact_kv_
from kvevict.reference.evict_slots import evict_slots_
from kvevict.reference.gather_kv import gather_kv
from kvevict.reference.key_diversity import key_diversity
from kvevict.reference.match_tokens import match_tokens
from kvevict.reference.merge_tokens import merge_tokens_
from kvevict.reference.mix_scores import mix_scores
from kvevict.reference.null import null
from kvevict.reference.rerotate_keys import rerotate_keys_
from kvevict.reference.score_and_compact import score_and_compact
from kvevict.reference.score_keys import score_keys
from kvevict.reference.score_keys_by_text import score_keys_by_text
from kvevict.reference.select_threshold import select_threshold
from kvevict.reference.select_topk import select_topk

__all__ = [
    "accumulate_scores_",
    "attention_lse",
    "broadcast_indices",
    "compact_kv_",
    "evict_slots_",
    "gather_kv",
    "key_diversity",
    "match_tokens",
    "merge_tokens_",
    "mix_scores",
    "null",
    "rerotate_keys_",
    "score_and_compact",
    "score_keys",
    "score_keys_by_text",
    "select_threshold",
    "select_topk",
]
