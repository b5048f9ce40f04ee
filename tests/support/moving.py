"""Inputs that gather_kv, compact_kv_ and their tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.shapes import make_tensor

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.float64,
    torch.complex64,
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
# Rows of 1 byte, of an odd number of bytes, of one vector, of more than a cache line.
every_head_dim = pytest.mark.parametrize("head_dim", [1, 3, 8, 80, 128, 257])


def make_caches(
    device: str,
    *,
    num_layers: int = 2,
    batch_size: int = 2,
    num_kv_heads: int = 3,
    kv_len: int = 45,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values of every layer."""

    def make(width: int) -> list[Tensor]:
        return [
            make_tensor(
                batch_size, num_kv_heads, kv_len, width, dtype=dtype, device=device, layout=layout
            )
            for _ in range(num_layers)
        ]

    return make(head_dim), make(head_dim if value_dim is None else value_dim)
