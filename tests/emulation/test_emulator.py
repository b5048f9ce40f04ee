"""The emulator itself: right kernels give right results, and every planted mistake shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from tests.emulation.schedules import ALL_SCHEDULES, Schedule, running, schedule

WARP = np.arange(32)
VALUES = np.array([(lane * 37 + 11) % 23 - 9 for lane in WARP], dtype=np.int32)


def rows(emulator: ModuleType) -> np.ndarray:
    return np.random.default_rng(0).integers(-99, 99, (3, 5 * emulator.ROW_SUM_TILE)).astype("f4")


# --- Right kernels --------------------------------------------------------------------------------


def test_sums_of_rows(emulator: ModuleType, every_schedule: Schedule) -> None:
    data = rows(emulator)
    with running(every_schedule):
        assert np.array_equal(emulator.sum_rows(data), data.sum(1))


def bf16_of(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_products_of_matrices(emulator: ModuleType, every_schedule: Schedule, element: str) -> None:
    """Small integers: every product and sum is exact."""
    random = np.random.default_rng(1)
    a = random.integers(-9, 9, (16, 64)).astype("f4")
    b = random.integers(-9, 9, (8, 64)).astype("f4")
    convert: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "bf16": bf16_of,
        "fp16": lambda x: x.astype(np.float16).view(np.uint16),
    }
    with running(every_schedule):
        d = getattr(emulator, f"multiply_{element}")(convert[element](a), convert[element](b))
    assert np.array_equal(d, a @ b.T)


def test_every_fp16_number(emulator: ModuleType) -> None:
    """Subnormal, infinite and NaN too."""
    b = np.zeros((8, 16), dtype=np.uint16)
    b[0, 0] = np.float16(1).view(np.uint16)
    for start in range(0, 1 << 16, 16 * 64):
        bits = np.arange(start, start + 16 * 64, dtype=np.uint16).reshape(64, 16)
        for column in bits:
            a = np.zeros((16, 16), dtype=np.uint16)
            a[:, 0] = column
            actual = emulator.multiply_fp16(a, b)[:, 0]
            expected = column.view(np.float16).astype(np.float32)
            assert np.array_equal(actual, expected, equal_nan=True)


def shuffled(lanes: np.ndarray, width: int = 32) -> np.ndarray:
    """Return what lanes get that ask for `lanes`; who asks beyond its segment gets its own."""
    return VALUES[np.where(lanes // width == WARP // width, lanes, WARP)]


def test_collectives(emulator: ModuleType, every_schedule: Schedule) -> None:
    bits = np.uint32(1) << WARP.astype(np.uint32)

    def mask(where: np.ndarray) -> np.int32:
        return np.uint32(bits[where].sum()).view(np.int32)

    halves = VALUES.reshape(2, 16)
    in_halves = halves.sum(1).repeat(16)
    apart = np.concatenate([VALUES[WARP[:16] ^ 1], np.full(16, mask((VALUES > 0) & (WARP >= 16)))])
    expected = {
        "rotate": VALUES[(WARP + 1) % 32],
        "rotate_in_8": VALUES[WARP // 8 * 8 + (WARP + 1) % 8],
        "up_3": shuffled(WARP - 3),
        "up_3_in_16": shuffled(WARP - 3, 16),
        "down_5": shuffled(WARP + 5),
        "down_5_in_8": shuffled(WARP + 5, 8),
        "xor_6": VALUES[WARP ^ 6],
        "xor_6_in_4": VALUES[np.where(WARP ^ 6 > WARP | 3, WARP, WARP ^ 6)],  # as PTX has it
        "ballot": mask(VALUES > 0),
        "any": int((VALUES == 7).any()),
        "all": 1,
        "match": np.array([mask(value == VALUES) for value in VALUES]),
        "reduce_add": VALUES.sum(),
        "reduce_min": VALUES.min(),
        "reduce_max": VALUES.max(),
        "reduce_or": np.bitwise_or.reduce(VALUES),
        "add_in_half": in_halves,
        "halves_apart": apart,
        "exited_lanes": np.where(WARP < 24, VALUES[:24].sum(), 0),
    }
    with running(every_schedule):
        actual = emulator.collectives(VALUES)
    assert set(actual) == set(expected)
    for name, result in actual.items():
        assert np.array_equal(result, np.broadcast_to(expected[name], 32)), name


def test_atomics_and_counting_barrier(emulator: ModuleType, every_schedule: Schedule) -> None:
    values = np.random.default_rng(2).integers(0, 32, 500, dtype=np.int32) * 2
    values[[7, 40, 100, 136]] += 1  # 7, 40, 4 and again 40 of 96 threads
    with running(every_schedule):
        counts, num_odd = emulator.count(values)
    assert np.array_equal(counts, np.bincount(values, minlength=64))
    assert num_odd == 3


@pytest.mark.parametrize("what", ["threads", "blocks"])
def test_orders(emulator: ModuleType, what: str) -> None:
    def order(name: str, seed: int = 0) -> list[int]:
        with schedule(name, seed=seed):
            result: list[int] = emulator.order(what, 40).tolist()
        return result

    assert order("forward") == list(range(40))
    assert order("reverse") == list(range(40))[::-1]
    assert sorted(order("random")) == list(range(40)) != order("random")
    assert order("random", 1) == order("random", 1) != order("random", 2)


# --- Mistakes -------------------------------------------------------------------------------------

SILENT = ("no_wait", "no_barrier_after_wait", "no_barrier_before_overwrite")
CAUGHT = {
    "index_out_of_bounds": r"kernels.cu:\d+: index 4 is out of the bounds of 'float \[4\]'",
    "copy_in_flight": r"the thread exits with 1 cp.async in flight",
    "too_little_shared": r"shared_memory: the struct has \d+ bytes, the launch gave \d+",
}


def test_every_mistake_is_tested(emulator: ModuleType) -> None:
    mistakes = {"none", "no_barrier_before_partial", *SILENT, *CAUGHT}
    assert set(emulator.ROW_SUM_MISTAKES) == mistakes


@pytest.mark.parametrize("mistake", [*SILENT, "no_barrier_before_partial"])
def test_races_give_wrong_results(emulator: ModuleType, mistake: str) -> None:
    """What only waits and barriers prevent happens under some schedules; most notice."""
    data = rows(emulator)
    noticed = 0
    for each in ALL_SCHEDULES:
        with running(each):
            noticed += not np.array_equal(emulator.sum_rows(data, mistake), data.sum(1))
    assert noticed >= len(ALL_SCHEDULES) // 2


@pytest.mark.parametrize("mistake", CAUGHT)
def test_mistakes_are_reported(
    emulator: ModuleType, every_schedule: Schedule, mistake: str
) -> None:
    with running(every_schedule), pytest.raises(RuntimeError, match=CAUGHT[mistake]):
        emulator.sum_rows(rows(emulator), mistake)


PLACE = r"block \([01], 0, 0\) thread \(\d+, 0, 0\): "
MISDEEDS = {
    "deadlock": PLACE
    + r"deadlock: of 64 threads, 32 at __syncthreads, 32 in __syncwarp of mask 0xffffffff",
    "different_collectives": PLACE + r"divergent collectives: .* of mask 0xffffffff, but lanes",
    "different_masks": PLACE + r"deadlock: of \d+ threads, \d+ at .* in __syncwarp of mask 0xffff",
    "not_in_the_mask": PLACE + r"__syncwarp: the thread is not in its own mask 0x00000002",
    "lane_outside_the_mask": PLACE + r"shuffle: lane \d+ reads lane \d+, which takes no part",
    "mma_of_half_a_warp": PLACE + r"mma bf16: only lanes 0xffff0000 of the warp take part",
    "waits_forever": PLACE + r"deadlock: of 64 threads, 64 in __nanosleep",
    "trap": PLACE + "__trap",
    "misaligned_copy": PLACE + r"cp.async from global memory: the address 0x\w+8 is not a multiple",
    "copy_behind_shared": PLACE + r"cp.async: 16 bytes at 0x\w+, not in the 1024 bytes of shared",
    "misaligned_load": PLACE + r"kernels.cu:\d+: a misaligned access to 'const struct uint4' at",
    "misaligned_streaming_store": PLACE + r"store_streaming: the address 0x\w+4 is not a multiple",
    "null_pointer": PLACE + r"kernels.cu:\d+: an access through a null pointer",
    "wild_pointer": PLACE + r"(a misaligned vector access, or a wild pointer|an access to memory)",
    "behind_shared": PLACE + r"an access behind the end of shared memory",
    "just_behind_shared": r"block \([01], 0, 0\) has written behind its shared memory",
    "endless_recursion": PLACE + r"the thread needs more than 65536 bytes of stack",
    "shift_too_far": PLACE + r"kernels.cu:\d+: 'int' is shifted by 32",
    "division_by_zero": PLACE + r"kernels.cu:\d+: a division by zero",
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_misdeeds_fail_the_launch(
    emulator: ModuleType, every_schedule: Schedule, misdeed: str
) -> None:
    """The process lives on, and so does the emulator."""
    with running(every_schedule):
        with pytest.raises(RuntimeError) as error:
            emulator.misbehave(misdeed)
        assert re.match(MISDEEDS[misdeed], str(error.value)), str(error.value)
        assert emulator.last_error() == str(error.value)
        data = rows(emulator)
        assert np.array_equal(emulator.sum_rows(data), data.sum(1))


def test_every_misdeed_is_tested(emulator: ModuleType) -> None:
    assert set(emulator.MISDEEDS) == {*MISDEEDS, "behind_global"}  # see test_sanitizers.py


# --- Launches -------------------------------------------------------------------------------------

ONE = (1, 1, 1)
KIB = 1024


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "allowed_bytes"),
    [
        (ONE, ONE, 0, 0),
        ((70_000, 1, 1), ONE, 0, 0),
        ((2, 3, 4), (32, 32, 1), 0, 0),
        (ONE, (1, 1, 64), 0, 0),
        (ONE, ONE, 227 * KIB, 227 * KIB),
    ],
)
def test_good_launches(
    emulator: ModuleType,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    allowed_bytes: int,
) -> None:
    emulator.reset_counters()
    emulator.launch_nothing(grid, block, shared_bytes, allowed_bytes)
    counters = emulator.counters()
    assert counters["launches"] == 1
    assert counters["blocks"] == np.prod(grid)
    assert counters["threads"] == np.prod(grid) * np.prod(block)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "allowed_bytes", "message"),
    [
        ((0, 1, 1), ONE, 0, 0, r"a grid of \(0, 1, 1\) blocks"),
        ((1, 65536, 1), ONE, 0, 0, r"a grid of \(1, 65536, 1\) blocks"),
        (ONE, (0, 1, 1), 0, 0, r"blocks of \(0, 1, 1\) threads"),
        (ONE, (1025, 1, 1), 0, 0, r"blocks of \(1025, 1, 1\) threads"),
        (ONE, (33, 32, 1), 0, 0, r"blocks of \(33, 32, 1\) threads"),
        (ONE, ONE, 100 * KIB + 16, 100 * KIB, "102416 bytes .* 102400 are allowed by cudaFuncSet"),
        (ONE, ONE, 228 * KIB, 228 * KIB, "233472 bytes of shared memory, but 232448 are all"),
    ],
)
def test_bad_launches_are_refused(
    emulator: ModuleType,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    allowed_bytes: int,
    message: str,
) -> None:
    with pytest.raises(RuntimeError, match=f"launch refused: {message}"):
        emulator.launch_nothing(grid, block, shared_bytes, allowed_bytes)


def test_more_than_48_kib_must_be_asked_for(emulator: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"49168 bytes .* but 49152 are allowed"):
        emulator.launch_nothing(ONE, ONE, 48 * KIB + 16, 48 * KIB)


def test_counters(emulator: ModuleType) -> None:
    data = rows(emulator)
    emulator.reset_counters()
    emulator.sum_rows(data)
    counters = emulator.counters()
    num_rows, num_warps = len(data), emulator.ROW_SUM_TILE // 4 // 32
    assert counters["copied_bytes"] == data.nbytes
    assert counters["barriers"] == num_rows * (2 * 5 + 1)
    assert counters["collectives"] == num_rows * (num_warps + 1) * 5
    emulator.multiply_fp16(np.ones((16, 64), "u2"), np.ones((8, 64), "u2"))
    assert emulator.counters()["mmas"] == 4
    assert counters["switches"] > 0
