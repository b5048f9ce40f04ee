"""The arithmetic of the benchmark harness: no clock is read here."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench.ceilings import Ceilings
from bench.harness import (
    MIN_SAMPLES,
    MIN_SAMPLES_OF_OURS,
    OURS,
    Case,
    InputSets,
    Rounds,
    Sample,
    Work,
    clone,
    due,
    input_sets_for_cold_cache,
    make_row,
    plan_samples,
    run_once,
    summarize,
    tensors_in,
    undisturbed,
)
from bench.report import Timing

MACHINE = Ceilings(
    num_threads=2,
    fp32_flops=100e9,
    bf16_flops=200e9,
    has_bf16_dot=True,
    read_rate=10e9,
    copy_rate=15e9,
    nt_copy_rate=20e9,
)


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.01, (seconds, seconds), 30, False)


def case_of(**fields: object) -> Case:
    defaults = {
        "op": "op",
        "name": "case",
        "contenders": {OURS: torch.neg, "peer": torch.clone},
        "make_inputs": lambda: torch.ones(4),
        "check": lambda inputs, results: None,
    }
    return Case(**(defaults | fields))


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    compute_bound = Work(flops=4e9, num_bytes=1e6, dtype=torch.bfloat16)
    memory_bound = Work(flops=4e9, num_bytes=1e9, dtype=torch.bfloat16, memory="nt_copy")
    assert compute_bound.floor_seconds(MACHINE) == pytest.approx(0.02)
    assert memory_bound.floor_seconds(MACHINE) == pytest.approx(0.05)


def test_row_adds_the_floors_of_its_stages() -> None:
    stages = (Work(flops=2e9), Work(num_bytes=2e8, memory="nt_copy"))
    row = make_row(
        case_of(stages=stages),
        {OURS: timing(0.06), "peer": timing(0.3)},
        MACHINE,
        {"peer": 5, OURS: 0, "somebody": 1},
        others=0.25,
    )
    assert row.floor_seconds == pytest.approx(0.03)
    assert row.compute_bound
    assert row.fraction_of_floor == pytest.approx(0.5)
    assert row.times_faster("peer") == pytest.approx(5)
    assert row.peak_bytes == {OURS: 0, "peer": 5}


def test_better_ceilings_count() -> None:
    later = Ceilings(2, 90e9, 210e9, True, 11e9, 15e9, 19e9)
    assert MACHINE.at_best(later) == Ceilings(2, 100e9, 210e9, True, 11e9, 15e9, 20e9)


def test_disturbed_samples_are_dropped() -> None:
    quiet = [Sample(0.010, 0.020)] * 20
    disturbed = [Sample(0.018, 0.022)] * 10
    assert undisturbed(quiet + disturbed) == quiet
    summary = summarize(disturbed + quiet)
    assert summary.median == 0.010
    assert not summary.noisy


def test_serial_work_is_not_taken_for_disturbed() -> None:
    samples = [Sample(0.010, 0.010)] * 10
    assert undisturbed(samples) == samples


def test_short_calls_are_all_kept() -> None:
    samples = [Sample(1e-4, cpu) for cpu in (0.0, 1e-4, 2e-4)]
    assert undisturbed(samples) == samples


def test_mostly_disturbed_runs_are_marked() -> None:
    summary = summarize([Sample(0.010, 0.020)] * 6 + [Sample(0.018, 0.020)] * 10)
    assert summary.noisy
    assert summary.median == 0.010
    assert summarize([Sample(0.010, 0.020)] + [Sample(0.018, 0.020)] * 3).median == 0.018


def test_summary_of_one_sample() -> None:
    summary = summarize([Sample(0.5, 1.0)])
    assert (summary.median, summary.spread, summary.halves) == (0.5, 0.0, (0.5, 0.5))


def test_summary_spread_and_halves() -> None:
    summary = summarize([Sample(w, 2 * w) for w in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)])
    assert summary.median == 2.0
    assert summary.halves == (1.0, 2.0)
    assert summary.spread == 0.5


def test_slow_peers_are_timed_less_often() -> None:
    planned = plan_samples({OURS: 0.010, "fast": 0.005, "slow": 1.0}, budget=3.0)
    assert planned == {OURS: 100, "fast": 200, "slow": MIN_SAMPLES}
    assert plan_samples({OURS: 1.0}, budget=1.0) == {OURS: MIN_SAMPLES_OF_OURS}


@pytest.mark.parametrize("num_samples", [1, 5, 7, 29, 30])
def test_samples_are_spread_evenly_over_the_rounds(num_samples: int) -> None:
    rounds = [r for r in range(1, 31) if due(r, 30, num_samples)]
    assert len(rounds) == num_samples
    gaps = {b - a for a, b in pairwise(rounds)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_enough_input_sets_to_leave_the_cache() -> None:
    assert input_sets_for_cold_cache(set_bytes=1 << 20, cache_bytes=32 << 20) == 97
    assert input_sets_for_cold_cache(set_bytes=1 << 30, cache_bytes=32 << 20) == 3
    assert input_sets_for_cold_cache(set_bytes=0, cache_bytes=1) > 0


def test_clone_copies_every_tensor() -> None:
    pair = namedtuple("pair", ["left", "right"])
    inputs = {"a": [torch.zeros(2)], "b": pair(torch.ones(3), None)}
    copy = clone(inputs)
    assert isinstance(copy["b"], pair)
    assert copy["b"].right is None
    for mine, theirs in zip(tensors_in(copy), tensors_in(inputs), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_input_sets_come_in_turn_and_are_restored() -> None:
    def restore(overwritten: torch.Tensor, pristine: torch.Tensor) -> None:
        overwritten.copy_(pristine)

    pristine = torch.arange(4.0)
    sets = InputSets(case_of(restore=restore, cold=False), pristine)
    first = sets.next()
    assert first.data_ptr() != pristine.data_ptr()
    first.zero_()
    assert sets.next() is first
    assert torch.equal(first, pristine)


def test_rounds_interleave() -> None:
    calls = []
    contenders = {name: lambda x, name=name: calls.append(name) for name in (OURS, "peer")}
    case = case_of(contenders=contenders, cold=False)
    rounds = Rounds(case, torch.ones(1), seconds=1e-9)
    calls.clear()
    for _ in range(rounds.number):
        arguments, _ = rounds.run_peers()
        rounds.run_ours(*arguments)
    assert calls.count(OURS) == rounds.number == MIN_SAMPLES_OF_OURS
    assert calls.count("peer") == MIN_SAMPLES
    assert all(a == OURS or b == OURS for a, b in pairwise(calls))
    assert set(rounds.timings()) == {OURS, "peer"}


def test_an_operator_in_place_is_checked_on_a_copy() -> None:
    case = case_of(
        contenders={OURS: lambda x: x.zero_().sum(), "peer": torch.clone},
        restore=lambda overwritten, pristine: None,
    )
    inputs = torch.ones(4)
    results = run_once(case, inputs)
    returned, overwritten = results[OURS]
    assert returned == 0
    assert torch.equal(overwritten, torch.zeros(4))
    assert torch.equal(results["peer"], torch.ones(4))


def test_every_benchmark_is_found() -> None:
    """As `make bench` starts it, without the tests' own configuration."""
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q"]
    root = Path(__file__).parents[2]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    ops = {path.name for path in root.glob("bench/ops/bench_*.py")}
    assert {name for name in ops if name not in found.stdout} == set()
