"""The workloads, and random inputs of their shapes.

Sizes of real prompts: A is LLaVA (one image, 32 layers), B a Qwen2.5-VL video, C decoding a batch.
On the CPU an operator runs on one layer, cache moves on a few (`layers_on_cpu`): the layers are
independent, so times of the whole model are multiples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """One attention layer of a model at work; `num_rows` query rows vote."""

    name: str
    num_layers: int
    layers_on_cpu: int
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    kv_len: int
    num_rows: int
    head_dim: int = 128

    @property
    def group_size(self) -> int:
        """Query heads that read one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def logits(self) -> int:
        """Visible (query row, key) pairs of one layer; the rows are the last of the prompt."""
        hidden = self.num_rows * (self.num_rows - 1) // 2
        return self.batch_size * self.num_qo_heads * (self.num_rows * self.kv_len - hidden)

    @property
    def matmul_flops(self) -> int:
        """FLOP of query times key over the visible pairs of one layer."""
        return 2 * self.logits * self.head_dim

    def key_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys of one layer."""
        return self.batch_size * self.num_kv_heads * self.kv_len * self.head_dim * dtype.itemsize

    def moved_bytes(self, percent: int, dtype: torch.dtype) -> int:
        """Bytes read and written to move `percent` of keys and values, `layers_on_cpu` layers."""
        return 4 * self.layers_on_cpu * self.key_bytes(dtype) * percent // 100

    def describe_moves(self, percent: int) -> str:
        """Name of a case that moves `layers_on_cpu` layers."""
        return f"{self.name} {percent}%, {self.layers_on_cpu} of {self.num_layers} layers"

    def kept(self, percent: int) -> int:
        """Keys kept by a budget of `percent`."""
        return self.kv_len * percent // 100


A8 = Workload("A8", 32, 8, 1, 32, 8, 2980, 100)
A32 = Workload("A32", 32, 2, 1, 32, 32, 2980, 100)
B32K = Workload("B32k", 28, 1, 1, 28, 4, 32768, 100)
B128K = Workload("B128k", 28, 1, 1, 28, 4, 131072, 100)
C = Workload("C", 32, 1, 32, 32, 8, 4096, 1)

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class AttentionInputs(NamedTuple):
    """query [batch_size, num_qo_heads, num_rows, head_dim], key/value of one layer."""

    query: Tensor
    key: Tensor
    value: Tensor


def attention_inputs(
    shape: Workload, dtype: torch.dtype, *, with_value: bool = False
) -> AttentionInputs:
    """Normal random inputs; the value is empty where not wanted."""
    cache = (shape.batch_size, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    query = (shape.batch_size, shape.num_qo_heads, shape.num_rows, shape.head_dim)
    return AttentionInputs(
        torch.randn(query, dtype=dtype),
        torch.randn(cache, dtype=dtype),
        torch.randn(cache if with_value else (0,), dtype=dtype),
    )


class CacheInputs(NamedTuple):
    """Keys and values by layer and the rows to keep, in the form that each contender takes."""

    keys: list[Tensor]
    values: list[Tensor]
    kept_indices: Tensor  # [num_layers, batch_size, num_kv_heads, k] int32, ascending
    gather_index: Tensor  # the same as int64
    flat_index: Tensor  # [num_layers, batch_size * num_kv_heads * k] int64, rows of a flat cache


def cache_inputs(shape: Workload, percent: int, dtype: torch.dtype) -> CacheInputs:
    """A cache of `layers_on_cpu` layers, and for every layer and head its own random list."""
    heads = (shape.layers_on_cpu, shape.batch_size, shape.num_kv_heads)
    gather_index = random_kept_indices((*heads, shape.kv_len), shape.kept(percent))
    first_row = torch.arange(heads[1] * heads[2]).view(1, *heads[1:], 1) * shape.kv_len

    def cache() -> list[Tensor]:
        return [
            torch.randn((*heads[1:], shape.kv_len, shape.head_dim), dtype=dtype)
            for _ in range(heads[0])
        ]

    return CacheInputs(
        cache(),
        cache(),
        gather_index.int(),
        gather_index,
        (gather_index + first_row).flatten(1),
    )


class MergeInputs(NamedTuple):
    """Keys and values of one layer, which tokens stay and which are merged into them."""

    key: Tensor
    value: Tensor
    kept: Tensor  # [batch_size, num_kv_heads, k] int32, ascending
    evicted: Tensor  # [batch_size, num_kv_heads, kv_len - k] int32, ascending
    match: Tensor  # [batch_size, num_kv_heads, kv_len - k] int32, of each evicted a kept one
    weight: Tensor  # [batch_size, num_kv_heads, kv_len] float32


def merge_inputs(shape: Workload, percent: int, dtype: torch.dtype) -> MergeInputs:
    """Normal random tokens, every head its own random list; matches are random, too."""
    heads = (shape.batch_size, shape.num_kv_heads)
    k = shape.kept(percent)
    order = torch.rand((*heads, shape.kv_len)).argsort()
    kept, evicted = (part.sort().values.int() for part in order.split([k, shape.kv_len - k], 2))
    place = torch.randint(k, evicted.shape)
    key, value = (torch.randn((*heads, shape.kv_len, shape.head_dim)).to(dtype) for _ in range(2))
    weight = torch.rand((*heads, shape.kv_len))
    return MergeInputs(key, value, kept, evicted, kept.gather(2, place), weight)


def random_kept_indices(rows: tuple[int, ...], k: int) -> Tensor:
    """Ascending lists of k of rows[-1] keys [*rows[:-1], k] int64."""
    return torch.rand(rows).topk(k, sorted=False).indices.sort().values


def attention_like_scores(*shape: int) -> Tensor:
    """Positive scores with a long tail, as sums of probabilities are."""
    return torch.randn(shape).mul_(2).exp_()
