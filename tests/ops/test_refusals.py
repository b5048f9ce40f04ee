"""Every bad call of tests/support/refusals.py is refused, in words, before anything is written."""

from __future__ import annotations

import random
import re
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tests.support.backends import CPU, EMULATED, OPS, WRITING, Backend, written_arguments
from tests.support.checks import assert_same_bytes, clone
from tests.support.refusals import REFUSALS, Refusal, make_good, overlapping_arguments
from tests.support.samples import Arguments, Sizes, make_sample


def on_device(tree: Arguments) -> Arguments:
    """Return a copy of the tensors that have bytes."""
    return clone(pytree.tree_map_only(Tensor, lambda t: None if t.is_meta else t, tree))


def refused(backend: Backend, op: str, arguments: Arguments, blamed: str) -> str:
    """Assert that the call is refused because of `blamed`; return the message."""
    before = on_device(arguments)
    with pytest.raises(ValueError) as error:
        backend.op(op)(**arguments)
    message = str(error.value)
    assert re.fullmatch(rf"kvevict::{op}: {blamed}(\[\d+\])? must .+, got .+", message), message
    assert_same_bytes(on_device(arguments), before, "written before the refusal")
    return message


@pytest.mark.parametrize("op", OPS)
def test_the_good_call_is_good(backend: Backend, op: str) -> None:
    backend.op(op)(**make_good(op, backend.device))


def test_every_argument_has_refusals() -> None:
    in_table = {(row.op, row.argument) for row in REFUSALS}
    for op in OPS:
        for argument, value in make_good(op, "cpu").items():
            assert isinstance(value, bool) or (op, argument) in in_table, f"{op} {argument}"


@pytest.mark.parametrize("row", REFUSALS, ids=str)
def test_refusal(backend: Backend, row: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVEVICT_DEBUG", raising=False)
    if row.reads_data and backend != CPU:
        monkeypatch.setenv("KVEVICT_DEBUG", "1")
    if row.case == "device" and backend == EMULATED:
        pytest.skip("a meta tensor asks for a fake kernel, and it has none")
    arguments = row.make_arguments(backend.device)
    message = refused(backend, row.op, arguments, row.blamed)
    if row.reads_data and backend != CPU:
        assert message == refused(CPU, row.op, row.make_arguments("cpu"), row.blamed)
    if row.reads_data or backend == EMULATED:  # has no fake kernels
        return
    with FakeTensorMode() as mode:
        fake_arguments = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        with pytest.raises(ValueError) as error:
            backend.op(row.op)(**fake_arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("place", [0, 255, 256, 700, 999])
def test_the_first_bad_value_of_many_is_named(place: int) -> None:
    row_k = torch.zeros(1, 1000, dtype=torch.int32)
    row_k[0, place:] = 7
    message = refused(
        CPU, "select_topk", {"scores": torch.zeros(1, 1000, 5), "k": 3, "row_k": row_k}, "row_k"
    )
    assert message.endswith(f"got 7 at [0, {place}]")
    if place == 0:
        return
    lists = torch.arange(1000, dtype=torch.int32)
    lists[place:] -= 1
    key = torch.zeros(1, 1, 1000, 8)
    arguments = {"keys": [key], "values": [key], "kept_indices": lists[None, None]}
    message = refused(CPU, "gather_kv", arguments, "kept_indices")
    assert message.endswith(f"got {place - 1} at [0, 0, {place}] after {place - 1}")


@pytest.mark.parametrize("debug", [None, "0"])
@pytest.mark.parametrize("row", [row for row in REFUSALS if row.reads_data], ids=str)
def test_bad_values_are_safe_on_cuda(
    cuda_backend: Backend, row: Refusal, debug: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not read values unless asked to; bad ones spoil the results and nothing else."""
    monkeypatch.delenv("KVEVICT_DEBUG", raising=False)
    if debug is not None:
        monkeypatch.setenv("KVEVICT_DEBUG", debug)
    arguments = row.make_arguments(cuda_backend.device)
    written = written_arguments(row.op)
    others = {name: value for name, value in arguments.items() if name not in written}
    before = clone(others)
    cuda_backend.op(row.op)(**arguments)
    assert_same_bytes(others, before)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("op", [op for op in WRITING if len(written_arguments(op)) == 2])
def test_key_and_value_that_overlap(backend: Backend, op: str, case: int) -> None:
    _, arguments = list(overlapping_arguments(op, backend.device))[case]
    refused(backend, op, arguments, "values" if "values" in arguments else "value")


def lengthened(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor that is too long for int32 indices, and takes no memory for it."""
    size = list(tensor.shape)
    size[dim] = 2**31
    return tensor.narrow(dim, 0, 1).expand(size)


TOO_LONG = (
    ("select_topk", "plain", {"scores": 2}),
    ("score_keys", "weights_per_head", {"query": 2}),
    ("score_keys_by_text", "plain", {"query": 2, "key": 2}),
    ("score_and_compact", "plain", {"key": 2, "value": 2}),
    ("gather_kv", "shared", {"keys": 2, "values": 2}),
    ("gather_kv", "shared", {"kept_indices": 2}),
    ("compact_kv_", "shared", {"keys": 2, "values": 2}),
    ("broadcast_indices", "full", {"kept_indices": 3}),
    ("broadcast_indices", "full", {"base_indices": 3}),
)


@pytest.mark.parametrize(("op", "sample", "long"), TOO_LONG)
def test_more_than_int32_can_index(
    backend: Backend, op: str, sample: str, long: dict[str, int]
) -> None:
    arguments = make_sample(op, sample, Sizes(backend.device))
    for name, dim in long.items():
        arguments[name] = pytree.tree_map(lambda t, dim=dim: lengthened(t, dim), arguments[name])
    words = (
        rf"kvevict::{op}: \w+(\[0\])? must have a (kv_len|qo_len|k) below 2147483648, got 21474836"
    )
    with pytest.raises(ValueError, match=words):
        backend.op(op)(**arguments)
    if backend == EMULATED:
        return
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=words):
        backend.op(op)(**pytree.tree_map_only(Tensor, mode.from_tensor, arguments))


def test_interleaved_key_and_value_do_not_overlap(backend: Backend) -> None:
    """Slices of one buffer, as a fused projection gives them, are fine."""
    fused = torch.randn(2, 6, 4, 16, device=backend.device)
    key, value = (half.transpose(1, 2) for half in fused.split(2, dim=2))
    kept_indices = torch.tensor([[[1, 3, 5]]], dtype=torch.int32, device=backend.device)
    expected = fused[:, [1, 3, 5]].clone()
    backend.op("compact_kv_")([key], [value], kept_indices.expand(2, 1, 3))
    assert_same_bytes(fused[:, :3], expected)


def test_interleaved_keys_and_values_of_different_width(backend: Backend) -> None:
    fused = torch.randn(2, 6, 3, 160, device=backend.device).transpose(1, 2)
    key, value = fused[..., :64], fused[..., 64:]
    kept_indices = torch.tensor([[[1, 3, 5]]], dtype=torch.int32, device=backend.device)
    expected = fused[:, :, [1, 3, 5]].clone()
    backend.op("compact_kv_")([key], [value], kept_indices.expand(2, 1, 3))
    assert_same_bytes(fused[:, :, :3], expected)


BUFFER_BYTES = 400
Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes, strides, offset


def random_layout(rng: random.Random, outer: tuple[int, ...], *, nested: bool) -> Layout:
    """Return where a small cache of bytes lies; nested: each stride steps over all smaller ones."""
    width = rng.randint(1, 4)
    strides, covered = [0, 0, 0], width
    for dim in rng.sample(range(3), 3):
        strides[dim] = covered + rng.choice([0, 0, 1, 2, 5]) if nested else rng.randint(0, 12)
        covered += strides[dim] * (outer[dim] - 1)
    return (*outer, width), (*strides, 1), rng.randint(0, 40)


def addresses(layout: Layout) -> list[int]:
    """Return the place of every element."""
    sizes, strides, offset = layout
    places = product(*map(range, sizes))
    return [offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in places]


@pytest.mark.parametrize("nested", [True, False])
def test_overlap_is_what_enumeration_finds(nested: bool) -> None:
    """Strides as tensors have them are told exactly; with others no overlap is accepted."""
    rng = random.Random(0)
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    accepted = 0
    for _ in range(2000):
        outer = tuple(rng.randint(1, 4) for _ in range(3))
        layouts = [random_layout(rng, outer, nested=nested) for _ in range(2)]
        if max(map(max, map(addresses, layouts))) >= BUFFER_BYTES:
            continue
        places = addresses(layouts[0]) + addresses(layouts[1])
        overlaps = len(set(places)) < len(places)
        key, value = (buffer.as_strided(*layout) for layout in layouts)
        try:
            CPU.op("compact_kv_")([key], [value], torch.empty(outer[0], 1, 0, dtype=torch.int32))
        except ValueError as error:
            assert "overlap" in str(error)
            assert overlaps or not nested, layouts
        else:
            assert not overlaps, layouts
            accepted += 1
    assert accepted > 100


def test_overlap_of_unrelated_strides_is_decided_quickly() -> None:
    """Caches of many rows that interleave in no common order are refused, not searched."""
    buffer = torch.zeros(40 << 20, dtype=torch.uint8)
    key = buffer.as_strided((1, 40, 10_000, 8), (0, 10_003 * 96, 64, 1), 0)
    value = buffer.as_strided((1, 40, 10_000, 8), (0, 10_001 * 96, 96, 1), 16)
    empty = torch.empty(1, 1, 0, dtype=torch.int32)
    refused(CPU, "compact_kv_", {"keys": [key], "values": [value], "kept_indices": empty}, "values")
