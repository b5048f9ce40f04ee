"""Interleaved timing of an operator and its peers in one run.

A `Case` names the contenders, how their inputs are made, how their results are checked and how fast
the hardware would allow them to be. `run_case` checks every contender, then times them in rounds
A, B, C, A, B, C, ... so that a disturbance of the machine meets all of them alike.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import ceilings
from bench.ceilings import Ceilings, last_level_cache_bytes
from bench.report import OURS, Goal, Row, Timing

MIN_SAMPLES, MAX_SAMPLES = 5, 200
MIN_SAMPLES_OF_OURS = 30

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Work:
    """What a stage must at least compute and move; its floor is the slower of the two.

    memory is the ceiling that the bytes are held against: "read" or "nt_copy".
    """

    flops: float = 0.0
    num_bytes: float = 0.0
    dtype: torch.dtype = torch.float32
    memory: str = "read"

    def compute_seconds(self, at_most: Ceilings) -> float:
        """The least time of the arithmetic."""
        return self.flops / at_most.flops(self.dtype)

    def memory_seconds(self, at_most: Ceilings) -> float:
        """The least time of the moves."""
        return self.num_bytes / getattr(at_most, f"{self.memory}_rate")

    def floor_seconds(self, at_most: Ceilings) -> float:
        """The least time on this machine."""
        return max(self.compute_seconds(at_most), self.memory_seconds(at_most))


@dataclass(frozen=True, eq=False)
class Case:
    """One line of the report.

    contenders: functions of one input set by name; the operator under test is `OURS`.
    make_inputs: makes one random input set, a (nested) tuple, list or dict of tensors.
    check: gets an input set and the results by contender; raises AssertionError.
    stages: what must be done one after the other; none where no floor makes sense.
    restore: gets an input set that `OURS` has overwritten and a pristine one.
    """

    op: str
    name: str
    contenders: Mapping[str, Run]
    make_inputs: Callable[[], Any]
    check: Callable[[Any, Mapping[str, Any]], None]
    stages: tuple[Work, ...] = ()
    goals: tuple[Goal, ...] = ()
    restore: Callable[[Any, Any], None] | None = None
    cold: bool = True

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, and processor seconds of all threads meanwhile."""

    wall: float
    cpu: float


def take_sample(run: Run, inputs: Any) -> Sample:
    """Times one call; its result is dropped after the clock has stopped."""
    cpu = time.process_time()
    start = time.perf_counter()
    result = run(inputs)
    wall = time.perf_counter() - start
    cpu = time.process_time() - cpu
    del result
    return Sample(wall, cpu)


class OtherProcesses:
    """How much of the processor everybody else has used since this was made."""

    def __init__(self) -> None:
        """Starts to count."""
        self._begin = self._now()

    def share(self) -> float:
        """0 is a quiet machine, 1 one whose every core was busy with something else."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        total = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, total[:8])
        ticks = user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def undisturbed(samples: list[Sample]) -> list[Sample]:
    """Drops the samples during which another process had a core.

    Then the threads get less processor time per second than they usually do. Calls of less than a
    millisecond are all kept: the clock is too coarse to judge them.
    """
    shares = sorted(s.cpu / s.wall for s in samples)
    usual = shares[int(0.9 * (len(shares) - 1))]
    return [s for s in samples if s.wall < 1e-3 or s.cpu >= 0.9 * usual * s.wall]


def summarize(samples: list[Sample]) -> Timing:
    """The median of the undisturbed samples, or of all where hardly any are left."""
    kept = undisturbed(samples)
    noisy = 2 * len(kept) < len(samples)
    walls = [s.wall for s in (kept if len(kept) >= MIN_SAMPLES else samples)]
    half = len(walls) // 2
    ordered = sorted(walls)
    spread = ordered[int(0.75 * (len(walls) - 1))] - ordered[int(0.25 * (len(walls) - 1))]
    return Timing(
        median=median(walls),
        spread=spread / median(walls),
        halves=(median(walls[:half] or walls), median(walls[half:])),
        num_samples=len(walls),
        noisy=noisy,
    )


def plan_samples(seconds: Mapping[str, float], budget: float) -> dict[str, int]:
    """How often each contender is timed: equal shares of `budget`, within the limits."""
    share = budget / len(seconds)
    return {
        name: min(
            MAX_SAMPLES,
            max(
                MIN_SAMPLES_OF_OURS if name == OURS else MIN_SAMPLES,
                int(share / max(each, 1e-9)),
            ),
        )
        for name, each in seconds.items()
    }


def due(round_index: int, num_rounds: int, num_samples: int) -> bool:
    """Whether a contender with `num_samples` in `num_rounds` runs in this round: evenly spaced."""
    return round_index * num_samples // num_rounds != (round_index - 1) * num_samples // num_rounds


def input_sets_for_cold_cache(set_bytes: int, cache_bytes: int) -> int:
    """Input sets to go through in turn, so that none is still cached when it comes again.

    Between two uses of a set all the others are read: three times the cache, as every thread may
    have one of its own.
    """
    return 1 + max(2, math.ceil(3 * cache_bytes / max(set_bytes, 1)))


def tensors_in(inputs: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a nested tuple, list or dict."""
    if isinstance(inputs, torch.Tensor):
        yield inputs
    elif isinstance(inputs, (list, tuple)):
        for item in inputs:
            yield from tensors_in(item)
    elif isinstance(inputs, dict):
        yield from tensors_in(list(inputs.values()))


def clone(inputs: Any) -> Any:
    """A copy of every tensor of a nested tuple, list or dict, at addresses of its own."""
    if isinstance(inputs, torch.Tensor):
        return inputs.clone()
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        return {name: clone(item) for name, item in inputs.items()}
    items = [clone(item) for item in inputs]
    return type(inputs)(*items) if hasattr(inputs, "_fields") else type(inputs)(items)


class InputSets:
    """Input sets in turn, filled again where the operator overwrites its arguments."""

    def __init__(self, case: Case, pristine: Any) -> None:
        """Copies `pristine` as often as the cache size demands."""
        self._restore = case.restore
        self._pristine = pristine
        set_bytes = sum(t.numel() * t.element_size() for t in tensors_in(pristine))
        number = input_sets_for_cold_cache(set_bytes, last_level_cache_bytes()) if case.cold else 1
        self._sets = [clone(pristine) for _ in range(number)]
        self._turn = -1

    def next(self) -> Any:
        """The set that has been left alone for longest; the one before is restored meanwhile."""
        if self._restore is not None:
            self._restore(self._sets[self._turn], self._pristine)
        self._turn = (self._turn + 1) % len(self._sets)
        return self._sets[self._turn]


def run_once(case: Case, inputs: Any) -> dict[str, Any]:
    """Runs every contender; returns the results by contender.

    An operator that overwrites its inputs runs on a copy, and gives (what it returned, the copy).
    """
    torch.compiler.reset()
    results = {}
    for name, run in case.contenders.items():
        if name == OURS and case.restore is not None:
            overwritten = clone(inputs)
            results[name] = (run(overwritten), overwritten)
        else:
            results[name] = run(inputs)
    return results


class Rounds:
    """Takes the samples of a case: in each round the peers whose turn it is, then `OURS`."""

    def __init__(self, case: Case, pristine: Any, seconds: float) -> None:
        """Makes the input sets and times every contender twice to plan `number` of rounds."""
        self._case = case
        self._sets = InputSets(case, pristine)
        self._samples: dict[str, list[Sample]] = defaultdict(list)
        cost = {name: min(self._cost(name) for _ in range(2)) for name in case.contenders}
        self._samples.clear()
        self._planned = plan_samples(cost, seconds)
        self._done = 0
        self.number = max(self._planned.values())

    def run_peers(self) -> tuple[tuple[Any], dict[str, Any]]:
        """Begins a round; returns the arguments of `run_ours`."""
        self._done += 1
        for name in self._case.contenders:
            if name != OURS and due(self._done, self.number, self._planned[name]):
                self._sample(name, self._sets.next())
        return (self._sets.next(),), {}

    def run_ours(self, inputs: Any) -> None:
        """Ends a round: `OURS` takes part in all of them."""
        self._sample(OURS, inputs)

    def timings(self) -> dict[str, Timing]:
        """What the rounds so far have given."""
        return {name: summarize(self._samples[name]) for name in self._case.contenders}

    def _sample(self, name: str, inputs: Any) -> None:
        self._samples[name].append(take_sample(self._case.contenders[name], inputs))

    def _cost(self, name: str) -> float:
        start = time.perf_counter()
        self._sample(name, self._sets.next())
        return time.perf_counter() - start


def run_case(
    case: Case,
    benchmark: Any,
    peak_bytes: Mapping[str, int],
    seconds: float,
) -> Row | None:
    """Checks all contenders, times them interleaved and returns the row of the report.

    The ceilings are measured before and after the rounds and the better figures count: on a shared
    machine they change within minutes.

    benchmark: pytest-benchmark's fixture, which drives the rounds; None returned where it is off.
    seconds: time to spend on the rounds.
    """
    torch.manual_seed(0)
    pristine = case.make_inputs()
    case.check(pristine, run_once(case, pristine))
    if benchmark.disabled:
        benchmark(case.contenders[OURS], pristine)
        return None
    rounds = Rounds(case, pristine, seconds)
    before = ceilings.measure()
    benchmark.group = case.op
    gc.collect()
    gc.disable()
    others = OtherProcesses()
    try:
        benchmark.pedantic(rounds.run_ours, setup=rounds.run_peers, rounds=rounds.number)
    finally:
        gc.enable()
    share = others.share()
    at_most = before.at_best(ceilings.measure())
    row = make_row(case, rounds.timings(), at_most, peak_bytes, share)
    row.goals = [goal.judge(row) for goal in case.goals]
    return row


def make_row(
    case: Case,
    timings: Mapping[str, Timing],
    at_most: Ceilings,
    peak_bytes: Mapping[str, int],
    others: float,
) -> Row:
    """The row of the report of a timed case."""
    compute = sum(stage.compute_seconds(at_most) for stage in case.stages)
    memory = sum(stage.memory_seconds(at_most) for stage in case.stages)
    return Row(
        op=case.op,
        case=case.name,
        timings=dict(timings),
        floor_seconds=sum(stage.floor_seconds(at_most) for stage in case.stages),
        compute_bound=compute > memory,
        flops=sum(stage.flops for stage in case.stages),
        num_bytes=sum(stage.num_bytes for stage in case.stages),
        peak_bytes={n: peak_bytes[n] for n in case.contenders if n in peak_bytes},
        ceilings=at_most.as_dict(),
        others=others,
    )
