"""One word per concept: no synonyms among the parameters and fields of the public Python API."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import kvevict
from kvevict import ops, policies, priority, reference

# What design and FlashInfer call: the synonyms that other codebases use for it.
SYNONYMS = {
    "batch_size": {"bsz", "bs", "n_batch", "num_batches"},
    "num_qo_heads": {"num_heads", "n_heads", "nheads", "num_attention_heads", "num_q_heads"},
    "num_kv_heads": {"n_kv", "n_kv_heads", "nheads_k", "num_key_value_heads", "num_heads_k"},
    "group_size": {"n_rep", "num_key_value_groups", "kv_groups"},
    "head_dim": {"d_head", "dim_head", "head_size", "hidden", "hidden_dim", "hidden_size"},
    "qo_len": {"q_len", "seq_len_q", "seqlen_q", "query_len", "num_queries"},
    "kv_len": {"k_len", "kv_seq_len", "seq_len", "seq_length", "seqlen", "seqlen_k", "num_keys"},
    "sm_scale": {"scale", "scaling", "softmax_scale"},
    "softmax_lse": {"lse", "logsumexp", "log_sum_exp"},
    "key_mask": {"mask", "attn_mask", "attention_mask", "padding_mask", "token_mask"},
    "kept_indices": {"topk_indices", "keep_indices", "keep_idx", "kept_idx", "idx", "indices"},
    "kept_lens": {"keep_lens", "lengths", "num_kept"},
    "budget": {"capacity", "max_capacity", "num_keep", "n_keep"},
    "num_sink": {"n_sink", "num_sinks", "sink_size", "sink_tokens"},
    "num_recent": {"n_recent", "recent_size", "recent_window"},
    "row_weight": {"row_weights", "weights", "token_weights"},
    "row_index": {"row_indices", "rows"},
    "pool_kernel": {"kernel_size", "pool_size", "pooling"},
}
WORDS = {synonym: word for word, synonyms in SYNONYMS.items() for synonym in synonyms}


def parameter_names(public: Any) -> list[str]:
    """Return the names a user writes: of a function's arguments, of a class' fields and methods."""
    if inspect.isfunction(public):
        return list(inspect.signature(public).parameters)
    if not inspect.isclass(public):
        return []
    names = [f.name for f in dataclasses.fields(public)] if dataclasses.is_dataclass(public) else []
    for name, member in vars(public).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            names += parameter_names(member)
    return names


def synonyms(public: Any) -> list[str]:
    found = sorted(set(parameter_names(public)) & set(WORDS))
    return [f"{public.__name__}: {name} should be {WORDS[name]}" for name in found]


def public_objects() -> list[Any]:
    modules = (ops, reference, policies, kvevict)
    objects = [getattr(m, name) for m in modules for name in m.__all__ if name != "evict"]
    return [*objects, priority.build_priority]


def test_no_synonyms() -> None:
    assert [line for public in public_objects() for line in synonyms(public)] == []


def test_no_synonyms_in_the_transformers_integration() -> None:
    pytest.importorskip("transformers")
    from kvevict.integrations import transformers as integration

    # A method that transformers calls, too, has transformers' words.
    public = (integration.evict, integration.EvictionReport, integration.KeptLayer)
    assert [line for o in public for line in synonyms(o)] == []


def test_a_synonym_is_found() -> None:
    def scores(query: Any, *, bsz: int = 1) -> None: ...

    @dataclasses.dataclass
    class Method:
        n_sink: int

        def select(self, topk_indices: Any) -> None: ...

    assert synonyms(scores) == ["scores: bsz should be batch_size"]
    assert len(synonyms(Method)) == 2
