"""Good calls of every op, small and named; what all ops must do is tested on them.

A new op adds its samples here; the first one is the base of its refusals and gives every optional
argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvevict.ops.enums import DiversityReference, HeadReduction, Metric, Statistic
from tests.support.shapes import make_lists, make_rows, make_tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a sample, so that one sample serves several shapes."""

    device: str = "cpu"
    num_layers: int = 2
    batch_size: int = 2
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    qo_len: int = 4
    kv_len: int = 6
    head_dim: int = 16
    num_rows: int = 3
    k: int = 3

    def query(self) -> Tensor:
        return make_tensor(
            self.batch_size, self.num_qo_heads, self.qo_len, self.head_dim, device=self.device
        )

    def cache(self) -> Tensor:
        return make_tensor(
            self.batch_size, self.num_kv_heads, self.kv_len, self.head_dim, device=self.device
        )

    def key_mask(self) -> Tensor:
        mask = torch.ones(self.batch_size, self.kv_len, dtype=torch.bool, device=self.device)
        mask[0, 1] = False
        return mask

    def row_index(self) -> Tensor:
        return make_rows(self.batch_size, self.num_rows, self.qo_len, self.device)

    def row_weight(self) -> Tensor:
        return torch.rand(self.batch_size, self.num_rows, device=self.device)

    def row_weight_per_head(self) -> Tensor:
        size = (self.batch_size, self.num_qo_heads, self.num_rows)
        return torch.rand(size, device=self.device)

    def softmax_lse(self) -> Tensor:
        return torch.rand(self.batch_size, self.num_qo_heads, self.qo_len, device=self.device) + 2

    def scores(self) -> Tensor:
        size = (self.batch_size, self.num_kv_heads, self.kv_len)
        return torch.randn(size, device=self.device)

    def mixed_scores(self) -> Arguments:
        size = (self.batch_size, self.num_kv_heads, self.kv_len)
        similarity, value_norm = torch.rand(2, *size, device=self.device)
        redundancy = torch.rand(size[:2], device=self.device)
        return {
            "scores": self.scores(),
            "similarity": similarity,
            "value_norm": value_norm,
            "redundancy": redundancy,
        }

    def priority(self, *heads: int) -> Tensor:
        size = (self.batch_size, *heads, self.kv_len)
        return torch.randint(0, 3, size, dtype=torch.uint8, device=self.device)

    def candidates(self) -> Tensor:
        """Return most of the keys."""
        mask = torch.ones(self.batch_size, self.kv_len, dtype=torch.bool, device=self.device)
        mask[:, ::5] = False
        return mask

    def row_k(self) -> Tensor:
        size = (self.batch_size, self.num_kv_heads)
        return torch.randint(0, self.k + 1, size, dtype=torch.int32, device=self.device)

    def block_tables(self) -> Tensor:
        """Return a table [num_layers, batch_size, max_pages] for pages of 4."""
        size = (self.num_layers, self.batch_size, (self.kv_len + 3) // 4)
        return torch.randint(0, 50, size, dtype=torch.int32, device=self.device)

    def lists(self, *outer: int, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Return lists [*outer, k] of lengths k - 1, k and smaller ones."""
        k = self.k if k is None else k
        return make_lists((*outer, k), self.kv_len, (k - 1, k, k // 2, 0), device=self.device)

    def positions(self, *outer: int) -> Tensor:
        """Return positions [*outer, kv_len]; some slots are empty, many have the same."""
        size = (*outer, self.kv_len)
        return torch.randint(-1, 9, size, dtype=torch.int32, device=self.device)

    def inv_freq(self, num_freqs: int) -> Tensor:
        return torch.rand(num_freqs, device=self.device)

    def token_lists(self, *heads: int) -> tuple[Tensor, Tensor]:
        """Return sources and targets [batch_size, *heads, ...] without a common token, some -1."""
        lists = []
        for places in (slice(0, None, 2), slice(1, None, 2)):
            positions = torch.arange(self.kv_len, dtype=torch.int32, device=self.device)[places]
            positions = positions.expand(self.batch_size, *heads, -1).clone()
            positions[..., positions.shape[-1] // 3] = -1
            lists.append(positions)
        return lists[0], lists[1]

    def groups(self, lists: Tensor) -> Tensor:
        """Return groups of neighboring places: of one, of two, of the rest."""
        place = torch.arange(lists.shape[-1], dtype=torch.int32, device=self.device)
        return ((place + 1) // 2).clamp(max=2).expand(lists.shape).clone()

    def token_weight(self, num_heads: int) -> Tensor:
        size = (self.batch_size, num_heads, self.kv_len)
        return torch.rand(size, device=self.device)

    def attention(self) -> Arguments:
        return {"query": self.query(), "key": self.cache()}

    def attention_options(self) -> Arguments:
        return {"key_mask": self.key_mask(), "sm_scale": 0.5}

    def voting_rows(self) -> Arguments:
        return {"row_index": self.row_index(), "softmax_lse": self.softmax_lse()}

    def caches(self) -> Arguments:
        return {
            "keys": [self.cache() for _ in range(self.num_layers)],
            "values": [self.cache() for _ in range(self.num_layers)],
        }

    def lists_of_all_layers(self) -> Arguments:
        lists = self.lists(self.num_layers, self.batch_size, self.num_kv_heads)
        return dict(zip(("kept_indices", "kept_lens"), lists, strict=True))

    def one_list_per_head(self) -> Arguments:
        return {"kept_indices": self.full_lists(self.batch_size, self.num_kv_heads)}

    def one_list_per_sequence(self) -> Arguments:
        lists = self.lists(self.batch_size, 1)
        return dict(zip(("kept_indices", "kept_lens"), lists, strict=True))

    def evictions(self, *outer: int) -> Tensor:
        """Return slots [*outer, k] of at most kv_len - 1 live rows."""
        lens = (1, self.k, self.k // 2, 0)
        return make_lists((*outer, self.k), self.kv_len - 1, lens, device=self.device)[0]

    def live_lens(self, *outer: int) -> Tensor:
        """Return kv_lens [*outer] of kv_len or 1 less."""
        size = torch.Size(outer)
        full = torch.arange(size.numel(), dtype=torch.int32, device=self.device) % 2
        return full.view(size) + self.kv_len - 1

    def full_lists(self, *outer: int, k: int | None = None) -> Tensor:
        """Return lists [*outer, k] without padding."""
        k = self.k if k is None else k
        return make_lists((*outer, k), self.kv_len, (k,), device=self.device)[0]


def _base_indices(s: Sizes) -> Arguments:
    return {"base_indices": s.full_lists(1, s.batch_size, s.num_kv_heads, k=s.kv_len)}


def _all_layers_and_heads(s: Sizes) -> Arguments:
    return {"num_layers": s.num_layers, "num_kv_heads": s.num_kv_heads}


def _pages(s: Sizes) -> Arguments:
    return {"block_tables": s.block_tables(), "page_size": 4}


def _voting(s: Sizes) -> Arguments:
    return {
        **s.attention(),
        **s.attention_options(),
        **s.voting_rows(),
        "row_weight": s.row_weight(),
        "causal": True,
    }


def _accumulation(s: Sizes, num_heads: int) -> Arguments:
    """Return scores with room for more keys than there are."""
    scores = torch.rand(s.batch_size, num_heads, s.kv_len + 3, device=s.device)
    return {"scores": scores, **s.attention()}


def _rotation(s: Sizes) -> Arguments:
    """Return keys of several axes and the pairs of channels that turn, not all of them."""
    num_freqs = s.head_dim // 2 - 1
    axis_of_freq = torch.arange(num_freqs, dtype=torch.int32, device=s.device) % 3
    return {
        "keys": s.caches()["keys"],
        "old_positions": s.positions(3, s.batch_size, 1),
        "new_positions": s.positions(3, s.num_layers, s.batch_size, s.num_kv_heads),
        "inv_freq": s.inv_freq(num_freqs),
        "axis_of_freq": axis_of_freq,
    }


def _compaction(s: Sizes) -> Arguments:
    return {**s.attention(), "value": s.cache(), "budget": s.k}


def _statistics(s: Sizes) -> Arguments:
    return {"sums": s.scores().abs(), "maxima": s.scores().abs(), "candidates": s.candidates()}


def _matching(s: Sizes, num_heads: int) -> Arguments:
    sources, targets = s.token_lists(num_heads)
    return {"tokens": s.cache(), "source_index": sources, "target_index": targets}


def _grouped_matching(s: Sizes) -> Arguments:
    lists = _matching(s, s.num_kv_heads)
    groups = {f"{name}_group": s.groups(lists[f"{name}_index"]) for name in ("source", "target")}
    return {**lists, **groups}


def _merging(s: Sizes, num_heads: int, *, of_one: bool = False) -> Arguments:
    """Return keys, and values twice as wide; sources meet random targets, or all the last one."""
    sources, targets = s.token_lists(num_heads)
    place = torch.randint(targets.shape[-1], sources.shape, device=s.device)
    if of_one:
        place.fill_(targets.shape[-1] - 1)
    key, value = s.cache(), s.cache()
    return {
        "tensors": [key, torch.cat([value, value.flip(1)], dim=-1)],
        "source_index": sources,
        "match_index": targets.gather(-1, place),
        "weight": s.token_weight(num_heads),
    }


Maker = Callable[[Sizes], Arguments]

SAMPLES: dict[str, dict[str, Maker]] = {
    "null": {"plain": lambda s: {"input": s.query()}},
    "accumulate_scores_": {
        "full": lambda s: {
            **_accumulation(s, s.num_kv_heads),
            **s.attention_options(),
            "decay": 0.9,
            "row_weight": torch.rand(s.batch_size, s.qo_len, device=s.device),
            "causal": True,
            "head_reduction": HeadReduction.GROUP_MEAN,
        },
        "plain": lambda s: _accumulation(s, s.num_kv_heads),
        "weights_per_head": lambda s: {
            **_accumulation(s, s.num_qo_heads),
            "row_weight": torch.rand(s.batch_size, s.num_qo_heads, s.qo_len, device=s.device),
            "causal": False,
            "head_reduction": HeadReduction.NONE,
        },
        "all_heads": lambda s: {
            **_accumulation(s, 1),
            "decay": 0.5,
            "head_reduction": HeadReduction.ALL_MEAN,
        },
    },
    "attention_lse": {
        "full": lambda s: {**s.attention(), **s.attention_options(), "causal": True},
        "plain": lambda s: s.attention(),
        "not_causal": lambda s: {"query": s.cache(), "key": s.cache(), "causal": False},
    },
    "score_keys": {
        "full": lambda s: {**_voting(s), "statistic": 0, "head_reduction": 1},
        "plain": lambda s: s.attention(),
        "max_of_group": lambda s: {
            **_voting(s),
            "statistic": Statistic.MAX,
            "head_reduction": HeadReduction.GROUP_MAX,
        },
        "max_of_mean": lambda s: {
            **s.attention(),
            "statistic": Statistic.MAX,
            "head_reduction": HeadReduction.ALL_MEAN,
        },
        "weights_per_head": lambda s: {
            **_voting(s),
            "row_weight": s.row_weight_per_head(),
            "causal": False,
            "statistic": Statistic.SUM_OF_SQUARES,
            "head_reduction": HeadReduction.NONE,
        },
        "all_heads": lambda s: {**s.attention(), "head_reduction": HeadReduction.ALL_MEAN},
    },
    "score_keys_by_text": {
        "full": lambda s: {**s.attention(), **s.attention_options(), **s.voting_rows()},
        "plain": lambda s: {**s.attention(), "row_index": s.row_index()},
    },
    "key_diversity": {
        "full": lambda s: {"key": s.cache(), "key_mask": s.key_mask()},
        "plain": lambda s: {"key": s.cache()},
    },
    "mix_scores": {
        "full": lambda s: {
            **s.mixed_scores(),
            "priority": s.priority(),
            "diversity_reference": DiversityReference.IMPORTANCE,
        },
        "plain": lambda s: s.mixed_scores(),
        "priority_per_head": lambda s: {**s.mixed_scores(), "priority": s.priority(s.num_kv_heads)},
    },
    "select_topk": {
        "full": lambda s: {
            "scores": s.scores(),
            "k": s.k,
            "row_k": s.row_k(),
            "priority": s.priority(),
        },
        "plain": lambda s: {"scores": s.scores(), "k": s.k},
        "priority_per_head": lambda s: {
            "scores": s.scores(),
            "k": s.k,
            "priority": s.priority(s.num_kv_heads),
        },
        "k_beyond_kv_len": lambda s: {"scores": s.scores(), "k": s.kv_len + 2},
    },
    "select_threshold": {
        "full": lambda s: {
            **_statistics(s),
            "ratio": 0.3,
            "kappa": None,
            "alpha": 1.0,
            "max_evicted": s.k,
            "key_mask": s.key_mask(),
        },
        "plain": lambda s: {**_statistics(s), "kappa": 0.86, "alpha": 1.0},
        "shared": lambda s: {
            **_statistics(replace(s, num_kv_heads=1)),
            "ratio": 0.5,
            "alpha": 1.5,
            "max_evicted": 1,
        },
    },
    "broadcast_indices": {
        "full": lambda s: {
            **s.lists_of_all_layers(),
            **_all_layers_and_heads(s),
            **_base_indices(s),
            **_pages(s),
        },
        "shared": lambda s: {**s.one_list_per_sequence(), **_all_layers_and_heads(s)},
        "base": lambda s: {
            **s.one_list_per_sequence(),
            **_all_layers_and_heads(s),
            **_base_indices(s),
        },
        "pages": lambda s: {**s.lists_of_all_layers(), **_all_layers_and_heads(s), **_pages(s)},
    },
    "gather_kv": {
        "full": lambda s: {**s.caches(), **s.lists_of_all_layers()},
        "without_lens": lambda s: {**s.caches(), **s.one_list_per_head()},
        "shared": lambda s: {**s.caches(), **s.one_list_per_sequence()},
    },
    "compact_kv_": {
        "full": lambda s: {**s.caches(), **s.lists_of_all_layers()},
        "without_lens": lambda s: {**s.caches(), **s.one_list_per_head()},
        "shared": lambda s: {**s.caches(), **s.one_list_per_sequence()},
    },
    "evict_slots_": {
        "full": lambda s: {
            **s.caches(),
            "slots": s.evictions(s.num_layers, s.batch_size, s.num_kv_heads),
            "kv_lens": s.live_lens(s.num_layers, s.batch_size, s.num_kv_heads),
        },
        "shared": lambda s: {
            **s.caches(),
            "slots": s.evictions(s.batch_size, 1),
            "kv_lens": s.live_lens(s.batch_size, 1),
        },
        "slots_per_layer": lambda s: {
            **s.caches(),
            "slots": s.evictions(s.num_layers, s.batch_size, 1),
            "kv_lens": s.live_lens(1, s.batch_size, s.num_kv_heads),
        },
    },
    "rerotate_keys_": {
        "full": lambda s: {**_rotation(s), "interleaved": True},
        "axes": _rotation,
        "plain": lambda s: {
            "keys": s.caches()["keys"],
            "old_positions": s.positions(s.batch_size),
            "new_positions": s.positions(s.batch_size),
            "inv_freq": s.inv_freq(s.head_dim // 2),
        },
        "per_head": lambda s: {
            "keys": s.caches()["keys"],
            "old_positions": s.positions(s.batch_size, s.num_kv_heads),
            "new_positions": s.positions(1, s.batch_size, 1),
            "inv_freq": s.inv_freq(s.head_dim // 2),
        },
    },
    "match_tokens": {
        "full": lambda s: {**_grouped_matching(s), "metric": Metric.COSINE},
        "plain": lambda s: _matching(s, s.num_kv_heads),
        "shared": lambda s: {**_matching(s, 1), "metric": Metric.DOT},
    },
    "merge_tokens_": {
        "full": lambda s: {**_merging(s, s.num_kv_heads), "normalize": True},
        "shared": lambda s: _merging(s, 1),
        "into_one": lambda s: _merging(s, s.num_kv_heads, of_one=True),
        "coefficients": lambda s: {**_merging(s, s.num_kv_heads), "normalize": False},
    },
    "score_and_compact": {
        "full": lambda s: {
            **_compaction(s),
            **_voting(s),
            "text_weighted": False,
            "priority": s.priority(),
            "head_reduction": 1,
            "pool_kernel": 3,
        },
        "plain": _compaction,
        "text_weighted": lambda s: {
            **_compaction(s),
            "row_index": s.row_index(),
            "text_weighted": True,
            "pool_kernel": 5,
        },
        "shared": lambda s: {
            **_compaction(s),
            "priority": s.priority(1),
            "head_reduction": HeadReduction.ALL_MEAN,
        },
        "per_head": lambda s: {
            **_compaction(s),
            "query": s.cache()[:, :, : s.qo_len],
            "key_mask": s.key_mask(),
            "head_reduction": HeadReduction.NONE,
        },
    },
}

NAMES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


def make_sample(op: str, sample: str, sizes: Sizes | None = None) -> Arguments:
    """Return the arguments of a sample."""
    return SAMPLES[op][sample](sizes or Sizes())
