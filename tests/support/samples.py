"""Good calls of every op, small and named; what all ops must do is tested on them.

A new op adds its samples here; the first one is the base of its refusals and gives every optional
argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction, Statistic
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

    def priority(self, *heads: int) -> Tensor:
        size = (self.batch_size, *heads, self.kv_len)
        return torch.randint(0, 3, size, dtype=torch.uint8, device=self.device)

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
