"""The ops: contracts and fake kernels. The kernels are in the compiled library."""

from kvevict import _library

_library.load()

from kvevict.ops.accumulate_scores import accumulate_scores_  # noqa: E402
from kvevict.ops.attention_lse import attention_lse  # noqa: E402
from kvevict.ops.broadcast_indices import broadcast_indices  # noqa: E402
from kvevict.ops.compact_kv import compact_kv_  # noqa: E402
from kvevict.ops.enums import DiversityReference, HeadReduction, Metric, Statistic  # noqa: E402
from kvevict.ops.evict_slots import evict_slots_  # noqa: E402
from kvevict.ops.gather_kv import gather_kv  # noqa: E402
from kvevict.ops.key_diversity import key_diversity  # noqa: E402
from kvevict.ops.match_tokens import match_tokens  # noqa: E402
from kvevict.ops.merge_tokens import merge_tokens_  # noqa: E402
from kvevict.ops.mix_scores import mix_scores  # noqa: E402
from kvevict.ops.null import null  # noqa: E402
from kvevict.ops.rerotate_keys import rerotate_keys_  # noqa: E402
from kvevict.ops.score_and_compact import score_and_compact  # noqa: E402
from kvevict.ops.score_keys import score_keys  # noqa: E402
from kvevict.ops.score_keys_by_text import score_keys_by_text  # noqa: E402
from kvevict.ops.select_threshold import select_threshold  # noqa: E402
from kvevict.ops.select_topk import select_topk  # noqa: E402

__all__ = [
    "DiversityReference",
    "HeadReduction",
    "Metric",
    "Statistic",
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
