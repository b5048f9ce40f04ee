"""compact_kv_: every kept byte is exact, and nothing outside the tensors is touched."""

from __future__ import annotations

import pytest
import torch

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, clone, outcome, to_cpu
from tests.support.moving import (
    CASES,
    LAYOUTS,
    every_case,
    make_caches,
    moving_arguments,
    storage_bytes,
)
from tests.support.samples import Arguments

OP = "compact_kv_"


def assert_exact(backend: Backend, arguments: Arguments) -> None:
    expected = outcome(reference.compact_kv_, to_cpu(arguments))
    assert_same_bytes(outcome(backend.op(OP), arguments), expected)


@pytest.mark.every_isa
@every_case
def test_matches_oracle(backend: Backend, case: str) -> None:
    assert_exact(backend, CASES[case](backend.device))


RUNS = {
    "head": torch.arange(600),
    "tail": torch.arange(400, 1000),
    "every_second": torch.arange(0, 1000, 2),
    "head_and_tail": torch.cat([torch.arange(10), torch.arange(900, 1000)]),
    "shift_by_one": torch.arange(1, 1000),
}


@pytest.mark.every_isa
@pytest.mark.parametrize("runs", RUNS)
def test_runs_of_rows(backend: Backend, runs: str) -> None:
    """Where source and destination overlap most, and where nothing has to move at all."""
    keys, values = make_caches(backend.device, kv_len=1000, head_dim=64)
    kept = RUNS[runs].to(backend.device, torch.int32).expand(2, 1, -1)
    assert_exact(backend, {"keys": keys, "values": values, "kept_indices": kept})


def test_keeping_everything_changes_nothing(backend: Backend) -> None:
    caches = make_caches(backend.device)
    before = clone(caches)
    everything = torch.arange(45, dtype=torch.int32, device=backend.device).expand(2, 1, -1)
    backend.op(OP)(*caches, everything)
    assert_same_bytes(caches, before)


def test_equals_gather(backend: Backend) -> None:
    arguments = moving_arguments(backend.device, k=17, lens=(17,), head_dim=80)
    gathered = backend.op("gather_kv")(**arguments)
    backend.op(OP)(**arguments)
    for caches, expected in zip((arguments["keys"], arguments["values"]), gathered, strict=True):
        assert_same_bytes([cache[:, :, :17] for cache in caches], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_only_inside_the_tensors(backend: Backend, layout: str) -> None:
    """The bytes around a slice of a larger buffer stay as they were."""
    arguments = moving_arguments(backend.device, layout=layout)
    caches = [*arguments["keys"], *arguments["values"]]
    before = [storage_bytes(cache).clone() for cache in caches]
    backend.op(OP)(**arguments)
    for cache, old in zip(caches, before, strict=True):
        new = storage_bytes(cache).clone()
        storage_bytes(cache).fill_(1)
        cache.zero_()
        outside = storage_bytes(cache) == 1
        assert_same_bytes(new[outside], old[outside])
        assert outside.any() == (layout == "sliced")


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Rows of one head more than 2**31 bytes apart; only the pages in use are ever touched."""
    whole = torch.empty(2**32 + 64, dtype=torch.uint8, device=backend.device)
    key = whole.as_strided((1, 1, 3, 64), (0, 0, 2**31, 1))
    key.copy_(torch.arange(3 * 64).view(1, 1, 3, 64))
    value = torch.arange(9, dtype=torch.uint8, device=backend.device).view(1, 1, 3, 3)
    kept = torch.tensor([[[1, 2]]], dtype=torch.int32, device=backend.device)
    backend.op(OP)([key], [value], kept)
    assert key[0, 0, :2].flatten().tolist() == list(range(64, 3 * 64))
    assert value[0, 0, :2].flatten().tolist() == list(range(3, 9))


def test_a_lazy_clone_gets_memory_of_its_own(backend: Backend) -> None:
    original = torch.randn(1, 2, 9, 8, device=backend.device)
    before = original.clone()
    key, value = torch._lazy_clone(original), torch._lazy_clone(original)
    kept = torch.tensor([[[2, 5, 8]]], dtype=torch.int32, device=backend.device)
    backend.op(OP)([key], [value], kept)
    assert torch.equal(original, before)
    assert torch.equal(key[:, :, :3], before[:, :, [2, 5, 8]])


@pytest.mark.parametrize("argument", ["kept_indices", "kept_lens"])
def test_lists_must_not_lie_in_the_cache(backend: Backend, argument: str) -> None:
    key = torch.arange(256, dtype=torch.int32, device=backend.device).view(1, 1, 32, 8)
    before = key.clone()
    kept = torch.arange(20, dtype=torch.int32, device=backend.device).view(1, 1, 20)
    kept_lens = kept[:, :, -1]
    if argument == "kept_indices":
        kept = key.view(1, 1, 256)[:, :, :20]
    else:
        kept_lens = key.view(1, 1, 256)[:, :, 9]
    with pytest.raises(ValueError, match=f"{argument} must not overlap keys"):
        backend.op(OP)([key], [key.clone()], kept, kept_lens)
    assert torch.equal(key, before)
