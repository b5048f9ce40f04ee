"""Every op gives the same bytes whatever the order of threads and the time of copies."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.emulation.schedules import ALL_SCHEDULES, Schedule, running
from tests.support.backends import EMULATED
from tests.support.checks import Arguments, assert_same_bytes, outcome
from tests.support.moving import moving_arguments
from tests.support.patterns import PATTERNS
from tests.support.samples import NAMES, Sizes, make_sample

SIZES = {
    "small": Sizes(),
    "several_tiles": Sizes("cpu", 2, 2, 8, 2, 37, 203, 64, num_rows=21, k=67),
    "one_row_of_many_keys": Sizes("cpu", 1, 1, 4, 2, 1, 701, 200, num_rows=1, k=300),
}
LARGE_TENSORS = ("query", "key", "value", "keys", "values", "tokens", "tensors")


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Return the arguments with query, key, value and tokens of that dtype."""
    cast = {name: arguments[name] for name in LARGE_TENSORS if name in arguments}
    return arguments | pytree.tree_map_only(Tensor, lambda tensor: tensor.to(dtype), cast)


def assert_bit_equal(emulator: ModuleType, op: str, arguments: Arguments) -> None:
    """Assert that an op gives the same bytes under all schedules."""
    function = EMULATED.op(op)
    emulator.reset_counters()
    with running(Schedule()):
        expected = outcome(function, arguments)
    assert emulator.counters()["launches"] > 0
    for schedule in ALL_SCHEDULES:
        with running(schedule):
            assert_same_bytes(outcome(function, arguments), expected, str(schedule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("op", "sample"), NAMES)
def test_samples(
    emulator: ModuleType, op: str, sample: str, sizes: str, dtype: torch.dtype
) -> None:
    if sizes == "one_row_of_many_keys" and sample == "not_causal":
        pytest.skip("has as many rows as keys")
    arguments = make_sample(op, sample, SIZES[sizes])
    assert_bit_equal(emulator, op, in_dtype(arguments, dtype))


@pytest.mark.parametrize("kv_len", [4097, 20_011, 70_001])
@pytest.mark.parametrize("pattern", ["random", "ties_at_pivot"])
def test_select_topk_from_long_rows(emulator: ModuleType, pattern: str, kv_len: int) -> None:
    scores = PATTERNS[pattern]((1, 2, kv_len))
    assert_bit_equal(emulator, "select_topk", {"scores": scores, "k": kv_len // 3})


@pytest.mark.parametrize("op", ["gather_kv", "compact_kv_"])
def test_long_lists(emulator: ModuleType, op: str) -> None:
    """More batches of rows than are on their way at a time."""
    lens = (2900, 2400)
    arguments = moving_arguments("cpu", (2, 1), k=2900, lens=lens, kv_len=3000, num_layers=1)
    assert_bit_equal(emulator, op, arguments)


@pytest.mark.parametrize("sample", ["full", "plain"])
def test_mixing_of_long_rows(emulator: ModuleType, sample: str) -> None:
    sizes = Sizes(batch_size=1, num_kv_heads=2, kv_len=8900)
    assert_bit_equal(emulator, "mix_scores", make_sample("mix_scores", sample, sizes))
