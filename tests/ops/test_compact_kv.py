"""compact_kv_: every kept byte is exact, and nothing outside the tensors is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, bytes_of, clone, outcome, to_cpu
from tests.support.moving import every_dtype, every_head_dim, every_layout, make_caches
from tests.support.shapes import make_lists

OP = "compact_kv_"
Caches = tuple[list[Tensor], list[Tensor]]
LENS = (20, 7, 1, 0)


def assert_exact(
    backend: Backend, caches: Caches, kept_indices: Tensor, kept_lens: Tensor | None
) -> None:
    names = ("keys", "values", "kept_indices", "kept_lens")
    arguments = dict(zip(names, (*caches, kept_indices, kept_lens), strict=True))
    expected = outcome(reference.compact_kv_, to_cpu(arguments))
    assert_same_bytes(outcome(backend.op(OP), arguments), expected)


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


@pytest.mark.parametrize(
    ("kv_len", "k"), [(1, 1), (1, 4), (9, 0), (9, 9), (9, 30), (0, 3), (3000, 2999)]
)
def test_edges_of_k(backend: Backend, kv_len: int, k: int) -> None:
    caches = make_caches(backend.device, kv_len=kv_len)
    assert_exact(
        backend, caches, *make_lists((2, 3, k), kv_len, (k, k // 2), device=backend.device)
    )


RUNS = {
    "head": torch.arange(600),
    "tail": torch.arange(400, 1000),
    "every_second": torch.arange(0, 1000, 2),
    "head_and_tail": torch.cat([torch.arange(10), torch.arange(900, 1000)]),
    "shift_by_one": torch.arange(1, 1000),
}


@pytest.mark.parametrize("runs", RUNS)
def test_runs_of_rows(backend: Backend, runs: str) -> None:
    """Where source and destination overlap most, and where nothing has to move at all."""
    kept = RUNS[runs].to(backend.device, torch.int32).expand(2, 1, -1)
    assert_exact(backend, make_caches(backend.device, kv_len=1000, head_dim=64), kept, None)


def test_keeping_everything_changes_nothing(backend: Backend) -> None:
    caches = make_caches(backend.device)
    before = clone(caches)
    everything = torch.arange(45, dtype=torch.int32, device=backend.device).expand(2, 1, -1)
    backend.op(OP)(*caches, everything)
    assert_same_bytes(caches, before)


@every_layout
def test_writes_only_inside_the_tensors(backend: Backend, layout: str) -> None:
    """The bytes around a slice of a larger buffer stay as they were."""
    caches = make_caches(backend.device, layout=layout, kv_len=40)
    storages = [cache.untyped_storage() for cache in (*caches[0], *caches[1])]
    before = [torch.tensor([], dtype=torch.uint8).set_(s.cpu().clone()) for s in storages]
    kept_indices, kept_lens = make_lists((2, 3, 20), 40, LENS, device=backend.device)
    backend.op(OP)(*caches, kept_indices, kept_lens)
    for cache, storage, old in zip((*caches[0], *caches[1]), storages, before, strict=True):
        cache.copy_(torch.zeros_like(cache))
        new = torch.tensor([], dtype=torch.uint8).set_(storage.cpu())
        inside = new.clone().fill_(1)
        mask = torch.tensor([], dtype=cache.dtype).set_(
            inside.untyped_storage(), cache.storage_offset(), cache.shape, cache.stride()
        )
        mask.zero_()
        assert torch.equal(new[inside == 1], old[inside == 1])


def test_empty_batch(backend: Backend) -> None:
    caches = make_caches(backend.device, batch_size=0)
    assert_exact(backend, caches, *make_lists((0, 3, 4), 45, (4,), device=backend.device))


def test_layers_of_different_size(backend: Backend) -> None:
    short = make_caches(backend.device, num_layers=1, kv_len=21, head_dim=8)
    long = make_caches(backend.device, num_layers=1, kv_len=400, head_dim=64, value_dim=24)
    caches = [*short[0], *long[0]], [*short[1], *long[1]]
    assert_exact(backend, caches, *make_lists((2, 2, 1, 20), 21, LENS, device=backend.device))


def test_equals_gather(backend: Backend) -> None:
    caches = make_caches(backend.device, kv_len=300, head_dim=80, dtype=torch.bfloat16)
    kept_indices, _ = make_lists((2, 3, 111), 300, (111,), device=backend.device)
    gathered = backend.op("gather_kv")(*caches, kept_indices)
    backend.op(OP)(*caches, kept_indices)
    for group, expected in zip(caches, gathered, strict=True):
        for cache, rows in zip(group, expected, strict=True):
            assert torch.equal(bytes_of(cache[:, :, :111]), bytes_of(rows))
