"""csrc/core/cpu/simd.h, on every instruction set of this CPU."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def assert_same_floats(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same bits, but for NaNs, which only must be NaN."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_exp2_is_within_2_ulp(host: ModuleType, isa: str) -> None:
    grid = np.linspace(-125, 127, 1 << 20, dtype=np.float32)
    near_zero = np.linspace(-1, 1, 1 << 18, dtype=np.float32)
    for t in (grid, near_zero):
        exact = np.exp2(t.astype(np.float64))
        ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
        assert np.max(np.abs(host.exp2(isa, t) - exact) / ulp) <= 2


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (-np.inf, 0.0),
        (-3e38, 0.0),
        (-200.0, 0.0),
        (-125.0, 2.0**-125),
        (128.0, np.inf),
        (3e38, np.inf),
        (np.inf, np.inf),
        (np.nan, np.nan),
    ],
)
def test_exp2_of_special_values(host: ModuleType, isa: str, t: float, expected: float) -> None:
    lanes = host.lanes(isa)
    result = host.exp2(isa, np.full(lanes, t, np.float32))
    np.testing.assert_allclose(result, np.full(lanes, expected), rtol=2.0**-22)


def test_exp2_of_very_small_values_may_be_flushed(host: ModuleType, isa: str) -> None:
    t = np.linspace(-160, -125, 1 << 12, dtype=np.float32)
    result = host.exp2(isa, t)
    assert np.all((result == 0) | (np.abs(result - np.exp2(t.astype(np.float64))) < 2.0**-147))


def test_exp2_does_not_mix_lanes(host: ModuleType, isa: str) -> None:
    t = np.linspace(-20, 20, host.lanes(isa), dtype=np.float32)
    alone = [host.exp2(isa, np.full_like(t, x))[0] for x in t]
    assert np.array_equal(host.exp2(isa, t), alone)


def test_transpose(host: ModuleType, isa: str) -> None:
    lanes = host.lanes(isa)
    bits = np.random.default_rng(0).integers(0, 1 << 32, (lanes, lanes), dtype=np.uint32)
    result = host.transpose(isa, bits.view(np.float32))
    assert np.array_equal(result.view(np.uint32), bits.T)


def test_half_to_float(host: ModuleType, isa: str) -> None:
    expected = EVERY_16_BITS.view(np.float16).astype(np.float32)
    assert_same_floats(host.half_to_float(isa, EVERY_16_BITS), expected)


def test_bfloat16_to_float(host: ModuleType, isa: str) -> None:
    expected = (EVERY_16_BITS.astype(np.uint32) << 16).view(np.float32)
    assert_same_floats(host.bfloat16_to_float(isa, EVERY_16_BITS), expected)


def numbers_around(values: np.ndarray) -> np.ndarray:
    """The values, the middles between neighbors, and the floats next to both; of both signs."""
    middles = (values[1:].astype(np.float64) + values[:-1].astype(np.float64)) / 2
    exact = np.concatenate([values, middles.astype(np.float32)])
    around = np.concatenate([np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf)])
    numbers = np.concatenate([exact, around, [np.inf, np.nan, 3e38, 65519, 65520, 65536]])
    numbers = np.concatenate([numbers, -numbers]).astype(np.float32)
    return np.resize(numbers, len(numbers) // 16 * 16 + 16)


def test_float_to_half(host: ModuleType, isa: str) -> None:
    finite = EVERY_16_BITS[:0x7C00].view(np.float16).astype(np.float32)
    numbers = numbers_around(finite)
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    actual = host.float_to_half(isa, numbers).view(np.float16)
    assert_same_floats(actual.astype(np.float32), expected.astype(np.float32))


def test_float_to_bfloat16(host: ModuleType, isa: str) -> None:
    finite = (EVERY_16_BITS[:0x7F80].astype(np.uint32) << 16).view(np.float32)
    numbers = numbers_around(finite)
    expected = torch.from_numpy(numbers).bfloat16().float().numpy()
    actual = host.float_to_bfloat16(isa, numbers).astype(np.uint32) << 16
    assert_same_floats(actual.view(np.float32), expected)


def test_an_instruction_set_that_is_not_there_is_refused(host: ModuleType) -> None:
    with pytest.raises(ValueError, match="isa must be one that this CPU has, got sse9"):
        host.lanes("sse9")
