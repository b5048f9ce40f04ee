"""Float64 oracles: every op again in plain torch, readable before fast.

An oracle has the name, the parameters and the defaults of its op. Floating results are float64,
indices int32. Arguments are not checked; what an op refuses is undefined here.
"""

from __future__ import annotations

from kvevict.reference.attention_lse import attention_lse
from kvevict.reference.broadcast_indices import broadcast_indices
from kvevict.reference.compact_kv import compact_kv_
from kvevict.reference.gather_kv import gather_kv
from kvevict.reference.match_tokens import match_tokens
from kvevict.reference.merge_tokens import merge_tokens_
from kvevict.reference.null import null
from kvevict.reference.score_and_compact import score_and_compact
from kvevict.reference.score_keys import score_keys
from kvevict.reference.score_keys_by_text import score_keys_by_text
from kvevict.reference.select_topk import select_topk

__all__ = [
    "attention_lse",
    "broadcast_indices",
    "compact_kv_",
    "gather_kv",
    "match_tokens",
    "merge_tokens_",
    "null",
    "score_and_compact",
    "score_keys",
    "score_keys_by_text",
    "select_topk",
]
