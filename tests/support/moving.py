"""Calls that the moving ops are tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.support.samples import Arguments
from tests.support.shapes import make_lists, make_tensor

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
LAYOUTS = ("contiguous", "transposed", "sliced")
# Rows of 1 byte, of an odd number of bytes, of one vector, of more than a cache line.
HEAD_DIMS = (1, 3, 8, 80, 128, 257)
LIST_FORMS = ((2, 1), (2, 3), (1, 2, 1), (1, 2, 3), (2, 2, 1), (2, 2, 3))
KV_LENS_AND_K = ((1, 1), (1, 4), (9, 0), (9, 9), (9, 30), (0, 3), (3000, 2999))
LENS = (20, 7, 1, 0)


def make_caches(
    device: str,
    *,
    num_layers: int = 2,
    batch_size: int = 2,
    kv_len: int = 45,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values of every layer, with 3 KV heads."""

    def make(width: int) -> list[Tensor]:
        size = (batch_size, 3, kv_len, width)
        return [
            make_tensor(*size, dtype=dtype, device=device, layout=layout) for _ in range(num_layers)
        ]

    return make(head_dim), make(head_dim if value_dim is None else value_dim)


def storage_bytes(cache: Tensor) -> Tensor:
    """Return the bytes of the whole buffer that a tensor is a slice of, as a view."""
    storage = cache.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(storage)


def moving_arguments(
    device: str,
    outer: tuple[int, ...] = (2, 2, 3),
    *,
    k: int = 20,
    lens: Iterable[int] = LENS,
    with_lens: bool = True,
    **caches: object,
) -> Arguments:
    """Return caches of `make_caches` and lists [*outer, k] of lengths that cycle over `lens`."""
    keys, values = make_caches(device, **caches)  # type: ignore[arg-type]
    kept_indices, kept_lens = make_lists((*outer, k), keys[0].shape[2], lens, device=device)
    return {
        "keys": keys,
        "values": values,
        "kept_indices": kept_indices,
        "kept_lens": kept_lens if with_lens else None,
    }


def _layers_of_different_size(device: str) -> Arguments:
    short = moving_arguments(device, (2, 2, 1), kv_len=21, head_dim=8)
    long = make_caches(device, num_layers=1, kv_len=400, head_dim=64, value_dim=24)
    short["keys"][1:], short["values"][1:] = long
    return short


def _cases() -> dict[str, Callable[[str], Arguments]]:
    calls: dict[str, dict[str, object]] = {}
    for dtype, layout in product(DTYPES, LAYOUTS):
        calls[f"{dtype}-{layout}"] = {"dtype": dtype, "layout": layout}
    for head_dim, dtype in product(HEAD_DIMS, (torch.uint8, torch.float32)):
        sizes = {"head_dim": head_dim, "value_dim": head_dim + 5}
        calls[f"head_dim_{head_dim}-{dtype}"] = {**sizes, "dtype": dtype}
    for outer in LIST_FORMS:
        calls[f"lists_{outer}"] = {"outer": outer}
        calls[f"lists_{outer}-without_lens"] = {"outer": outer, "lens": (20,), "with_lens": False}
    for kv_len, k in KV_LENS_AND_K:
        calls[f"kv_len_{kv_len}-k_{k}"] = {"kv_len": kv_len, "k": k, "lens": (k, k // 2)}
    # Rows of 8 and 24 bytes at distances of 16 and 32.
    narrow = {"dtype": torch.uint8, "head_dim": 8, "value_dim": 24, "layout": "sliced"}
    calls["rows_less_aligned_than_strides"] = narrow
    calls["batch_0"] = {"batch_size": 0, "outer": (0, 3)}
    for layout in LAYOUTS:  # more bytes than the CPU writes through its caches
        sizes = {"kv_len": 150, "head_dim": 128, "k": 110, "lens": (110, 41, 1, 0)}
        calls[f"large-{layout}"] = {**sizes, "dtype": torch.float16, "layout": layout}

    def maker(call: dict[str, object]) -> Callable[[str], Arguments]:
        return lambda device: moving_arguments(device, **call)  # type: ignore[arg-type]

    cases = {name: maker(call) for name, call in calls.items()}
    return {**cases, "layers_of_different_size": _layers_of_different_size}


CASES = _cases()
every_case = pytest.mark.parametrize("case", CASES)
