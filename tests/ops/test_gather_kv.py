"""gather_kv: every byte is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, to_cpu
from tests.support.moving import every_dtype, every_head_dim, every_layout, make_caches
from tests.support.shapes import make_lists

OP = "gather_kv"
Caches = tuple[list[Tensor], list[Tensor]]
LENS = (20, 7, 1, 0)


def assert_exact(
    backend: Backend, caches: Caches, kept_indices: Tensor, kept_lens: Tensor | None
) -> None:
    before = to_cpu(caches)
    actual = backend.op(OP)(*caches, kept_indices, kept_lens)
    assert_same_bytes(caches, before)
    assert_same_bytes(actual, reference.gather_kv(*before, *to_cpu((kept_indices, kept_lens))))


@every_dtype
@every_layout
def test_dtypes_and_layouts(backend: Backend, dtype: torch.dtype, layout: str) -> None:
    caches = make_caches(backend.device, dtype=dtype, layout=layout)
    assert_exact(backend, caches, *make_lists((2, 2, 3, 20), 45, LENS, device=backend.device))


@pytest.mark.every_isa
@every_head_dim
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_head_dims(backend: Backend, head_dim: int, dtype: torch.dtype) -> None:
    caches = make_caches(backend.device, head_dim=head_dim, value_dim=head_dim + 5, dtype=dtype)
    assert_exact(backend, caches, *make_lists((2, 2, 3, 20), 45, LENS, device=backend.device))


@pytest.mark.parametrize(
    "outer", [(2, 1), (2, 3), (1, 2, 1), (1, 2, 3), (2, 2, 1), (2, 2, 3)], ids=str
)
@pytest.mark.parametrize("with_lens", [True, False])
def test_every_form_of_list(backend: Backend, outer: tuple[int, ...], with_lens: bool) -> None:
    lens = LENS if with_lens else (20,)
    kept_indices, kept_lens = make_lists((*outer, 20), 45, lens, device=backend.device)
    caches = make_caches(backend.device)
    assert_exact(backend, caches, kept_indices, kept_lens if with_lens else None)


@pytest.mark.parametrize(("kv_len", "k"), [(1, 1), (1, 4), (9, 0), (9, 9), (9, 30), (0, 3)])
def test_edges_of_k(backend: Backend, kv_len: int, k: int) -> None:
    caches = make_caches(backend.device, kv_len=kv_len)
    assert_exact(
        backend, caches, *make_lists((2, 3, k), kv_len, (k, k // 2), device=backend.device)
    )


def test_empty_batch(backend: Backend) -> None:
    caches = make_caches(backend.device, batch_size=0)
    assert_exact(backend, caches, *make_lists((0, 3, 4), 45, (4,), device=backend.device))


def test_layers_of_different_size(backend: Backend) -> None:
    short = make_caches(backend.device, num_layers=1, kv_len=21, head_dim=8)
    long = make_caches(backend.device, num_layers=1, kv_len=400, head_dim=64, value_dim=24)
    caches = [*short[0], *long[0]], [*short[1], *long[1]]
    assert_exact(backend, caches, *make_lists((2, 2, 1, 20), 21, LENS, device=backend.device))


def test_beyond_kept_lens_anything_may_stand(backend: Backend) -> None:
    caches = make_caches(backend.device)
    kept_indices, kept_lens = make_lists((2, 3, 20), 45, LENS, device=backend.device)
    expected = backend.op(OP)(*caches, kept_indices, kept_lens)
    beyond = torch.arange(20, device=backend.device) >= kept_lens[..., None]
    spoiled = kept_indices.masked_fill(beyond, 2**30)
    assert_same_bytes(backend.op(OP)(*caches, spoiled, kept_lens), expected)
