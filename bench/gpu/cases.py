"""The rows of the GPU report: the cases of bench/ops on the GPU, with the goals of the GPU.

    python -m bench.gpu.cases --out ROWS.jsonl --ceilings FILE.json --seconds S [--dry-run]

One line of JSON per case, written as soon as it is done; `report.py` starts this again behind a
case that broke the process. Where a name has "x32" the layers of the model are one batch.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kvevict
from bench.gpu.ceilings import GpuCeilings
from bench.gpu.timer import CudaTimer, WallTimer, summarize, timer
from bench.harness import Case, clone, make_row
from bench.ops import (
    bench_accumulate_scores,
    bench_attention_lse,
    bench_compact_kv,
    bench_evict_slots,
    bench_gather_kv,
    bench_key_diversity,
    bench_mix_scores,
    bench_rerotate_keys,
    bench_score_and_compact,
    bench_score_keys,
    bench_score_keys_by_text,
    bench_select_threshold,
    bench_select_topk,
)
from bench.report import OURS, Goal, Row, Timing, fraction_of_peak, times_faster
from bench.shapes import A8, A32, B32K, B128K, C, Workload

BF16 = torch.bfloat16
PERCENTS = (20, 5, 50)
SECONDS_TO_COMPILE = 20
SECONDS_PER_TIMING = 0.3  # of one contender, in each of eager and replayed calls
MOST_SETS, MOST_BYTES_OF_SETS = 128, 40 << 30
MIN_SAMPLES, MAX_SAMPLES = 30, 200
FEW_SAMPLES = 7  # of a peer that takes longer than SLOW
SLOW = 0.02
COMPILED = ("compile", "best torch")
NOT_CAPTURABLE = (("score_and_compact", "eager"),)  # it reads a maximum back


# --- goals ---------------------------------------------------------------------------------------


def at_most_floor(factor: float, extra_seconds: float) -> Goal:
    """No longer than `factor` times the floor and `extra_seconds`."""

    def measure(row: Row) -> tuple[str, bool]:
        limit = factor * row.floor_seconds + extra_seconds
        return f"{row.ours.median / limit:.2f} of that", row.ours.median <= limit

    return Goal(f"{factor:g} x floor + {extra_seconds * 1e6:.0f} us", measure)


def as_fast_as_the_best_peer() -> Goal:
    """No slower than any peer."""

    def measure(row: Row) -> tuple[str, bool]:
        ratio = min(timing.median for timing in row.peers.values()) / row.ours.median
        return f"{ratio:.2f}x", ratio >= 1

    return Goal("1x best peer", measure)


def at_most_time(seconds: float) -> Goal:
    """No longer than a fixed time."""

    def measure(row: Row) -> tuple[str, bool]:
        return f"{row.ours.median * 1e6:.1f} us", row.ours.median <= seconds

    return Goal(f"{seconds * 1e6:.0f} us", measure)


def within_two_passes(factor: float) -> Goal:
    """At most `factor` times the LSE and the scores from it, one after the other."""

    def measure(row: Row) -> tuple[str, bool]:
        ratio = row.ours.median / row.timings["two passes"].median
        return f"{ratio:.2f}x", ratio <= factor

    return Goal(f"<= {factor:g} x two passes", measure)


# --- cases ---------------------------------------------------------------------------------------


def layers_as_batch(shape: Workload) -> Workload:
    """All layers of the model in one call."""
    return replace(
        shape,
        name=f"{shape.name} x{shape.num_layers}",
        batch_size=shape.batch_size * shape.num_layers,
    )


def with_goals(case: Case, *goals: Goal, compiled: bool = False, **extra: Any) -> Case:
    """The case with other goals and `extra` peers; without the compiled ones where not wanted."""
    contenders = {
        name: run for name, run in case.contenders.items() if compiled or name not in COMPILED
    }
    return replace(case, goals=goals, contenders={**contenders, **extra})


def two_passes(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Our LSE, then our scores from it: not a peer, but what the one call is measured against."""
    lse = kvevict.attention_lse(x["query"], x["key"])
    return kvevict.score_keys(x["query"], x["key"], softmax_lse=lse)


def flashinfer_topk(k: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """FlashInfer's selection and a sort of the indices, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}

    def run(scores: torch.Tensor) -> torch.Tensor:
        flashinfer = importlib.import_module("flashinfer")
        index = flashinfer.top_k(scores.flatten(0, -2), k)[1]
        return index.view(*scores.shape[:-1], k).sort(dim=-1).values

    return {"flashinfer + sort": run}


def score_keys(shape: Workload, *, given_lse: bool, compiled: bool = False) -> Case:
    """Scores with a given LSE, or without."""
    case = bench_score_keys.make_case(shape, BF16, given_lse=given_lse)
    workload = shape.name.split(" ")[0]
    if not given_lse:
        goals = (fraction_of_peak(0.8),) if workload == "C" else (within_two_passes(1.15),)
        return with_goals(case, *goals, compiled=compiled, **{"two passes": two_passes})
    fractions = {"B32k": 0.4, "B128k": 0.4, "A32": 0.75}
    goals = (fraction_of_peak(fractions[workload]),) if workload in fractions else ()
    return with_goals(case, *goals, compiled=compiled)


def accumulate_scores(shape: Workload, *, compiled: bool = False) -> Case:
    """A decoding step."""
    case = bench_accumulate_scores.make_case(shape, BF16)
    return with_goals(case, fraction_of_peak(0.7), compiled=compiled)


def score_keys_by_text(shape: Workload, *, compiled: bool = False) -> Case:
    """Text-weighted scores."""
    case = bench_score_keys_by_text.make_case(shape, BF16)
    return with_goals(case, times_faster("eager", 15), compiled=compiled)


def key_diversity(shape: Workload, *, compiled: bool = False) -> Case:
    """Mean cosines; the goal counts one read of the keys."""
    case = bench_key_diversity.make_case(shape, BF16)
    return with_goals(case, fraction_of_peak(0.8), compiled=compiled)


def mix_scores(shape: Workload, *, compiled: bool = False) -> Case:
    """The scores of MixKV."""
    return with_goals(
        bench_mix_scores.make_case(shape), as_fast_as_the_best_peer(), compiled=compiled
    )


def select_topk(shape: Workload, percent: int) -> Case:
    """Ascending lists."""
    case = bench_select_topk.make_case(shape, percent)
    goals = [as_fast_as_the_best_peer()]
    if shape.name.startswith("A"):
        goals.append(times_faster("topk + sort", 10))
    return with_goals(case, *goals, **flashinfer_topk(shape.kept(percent)))


def select_threshold(shape: Workload, percent: int | None = None) -> Case:
    """One list from two statistics."""
    return with_goals(bench_select_threshold.make_case(shape, percent), as_fast_as_the_best_peer())


def evict_slots(shape: Workload, m: int) -> Case:
    """Rows of all layers in one call."""
    goal = at_most_time(5e-6) if m == 1 else fraction_of_peak(0.7)
    return with_goals(bench_evict_slots.make_case(shape, m), goal)


def compact_kv(shape: Workload, percent: int) -> Case:
    """Keys and values of all layers in one call."""
    goal = fraction_of_peak(0.7 if percent < 20 else 0.85)
    return with_goals(bench_compact_kv.make_case(shape, percent), goal)


def rerotate_keys(shape: Workload, *, by_head: bool = False) -> Case:
    """Keys of all layers in one call."""
    return with_goals(bench_rerotate_keys.make_case(shape, by_head=by_head), fraction_of_peak(0.8))


def score_and_compact(shape: Workload, *, compiled: bool = False) -> Case:
    """Score, pool, select and move 20%."""
    case = bench_score_and_compact.make_case(shape, 20, BF16)
    return with_goals(
        case, at_most_floor(1.25, 10e-6), times_faster("eager", 15), compiled=compiled
    )


def for_moves(shape: Workload) -> Workload:
    """The workload with all its layers in one call; a quarter of them of the largest cache."""
    layers = shape.num_layers // 4 if shape.name == "C" else shape.num_layers
    return replace(shape, layers_on_cpu=layers)


def tiny(shape: Workload) -> Workload:
    """A workload for rehearsals."""
    return replace(
        shape,
        num_layers=4,
        batch_size=min(shape.batch_size, 2),
        kv_len=80,
        num_rows=min(shape.num_rows, 10),
        head_dim=16,
    )


def make_cases(dry_run: bool) -> list[Callable[[], Case]]:
    """Every case as a function that makes it, what the goals speak of first."""
    a8, a32, b32k, b128k, c = (
        tiny(shape) if dry_run else shape for shape in (A8, A32, B32K, B128K, C)
    )
    deep = [layers_as_batch(shape) for shape in (a8, a32, b32k)]
    single = (a32, b32k, b128k, c, a8)
    cases: list[Callable[[], Case]] = []

    def add(make: Callable[..., Case], *arguments: Any, **options: Any) -> None:
        cases.append(lambda: make(*arguments, **options))

    for percent in PERCENTS:
        for shape in (a8, a32, b32k):
            add(compact_kv, for_moves(shape), percent)
    for shape in (*deep, b128k):
        add(score_keys, shape, given_lse=True)
    for shape in (*deep, b128k, c):
        add(score_keys, shape, given_lse=False)
    for shape in deep:
        add(score_and_compact, shape)
    for shape in (*single, *deep):
        add(select_topk, shape, 20)
    add(evict_slots, replace(c, layers_on_cpu=c.num_layers), 1)
    add(evict_slots, for_moves(a32), a32.kv_len // 2)
    for shape in (a8, b32k, b128k):
        add(select_threshold, shape)
    add(select_threshold, b32k, 20)
    for shape in deep:
        add(score_keys_by_text, shape)
    for shape in (*deep, b128k):
        add(key_diversity, shape)
        add(mix_scores, shape)
    # One layer a call, as a model runs them; with the compiled peers.
    for shape in (a32, b32k, a8):
        compiled = not dry_run and shape is not a8
        add(score_keys, shape, given_lse=True, compiled=compiled)
        add(score_keys, shape, given_lse=False, compiled=compiled)
        add(score_keys_by_text, shape, compiled=compiled)
        add(score_and_compact, shape, compiled=compiled)
        add(key_diversity, shape, compiled=compiled)
        add(mix_scores, shape, compiled=compiled)
    for shape in single:
        add(bench_attention_lse.make_case, shape, BF16)
    for shape in (c, *deep):
        add(accumulate_scores, shape)
    for shape in (a8, a32, b32k):
        add(rerotate_keys, for_moves(shape))
    add(rerotate_keys, for_moves(a8), by_head=True)
    for shape in (a8, a32, b32k, b128k, c):
        add(bench_gather_kv.make_case, for_moves(shape), 20)
    for percent in PERCENTS:
        for shape in (b128k, c):
            add(compact_kv, for_moves(shape), percent)
        for shape in (*single, *deep):
            if percent != 20:
                add(select_topk, shape, percent)
    return cases


# --- running -------------------------------------------------------------------------------------


@contextmanager
def at_most_seconds(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the middle of what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def describe(error: BaseException) -> str:
    """One line for the report."""
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]


@dataclass
class Outcome:
    """What a case has given; errors by contender, of OURS if the case was not timed."""

    op: str
    case: str
    errors: dict[str, str]
    eager: dict[str, Timing]
    graph: dict[str, Timing]
    peak_bytes: dict[str, int]
    input_sets: int = 0


def first_results(case: Case, pristine: Any, outcome: Outcome) -> dict[str, Any]:
    """Runs every contender once; those that fail or take too long to compile are out."""
    results = {}
    for name, run in case.contenders.items():
        try:
            with at_most_seconds(SECONDS_TO_COMPILE):
                if name == OURS and case.restore is not None:
                    overwritten = clone(pristine)
                    results[name] = (run(overwritten), overwritten)
                else:
                    results[name] = run(pristine)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        except Exception as error:
            outcome.errors[name] = describe(error)
    return results


def check_results(case: Case, pristine: Any, results: dict[str, Any], outcome: Outcome) -> None:
    """Holds the results against the oracle; a peer that is wrong is out."""
    while OURS in results:
        error = error_of_check(case, pristine, results)
        if error is None:
            return
        wrong = to_blame(case, pristine, results, error)
        outcome.errors[wrong] = error
        del results[wrong]


def error_of_check(case: Case, pristine: Any, results: Mapping[str, Any]) -> str | None:
    """What the check says; None if all is right."""
    try:
        case.check(pristine, results)
    except Exception as error:
        return describe(error)
    return None


def to_blame(case: Case, pristine: Any, results: Mapping[str, Any], error: str) -> str:
    """The contender that the error names, or the peer without which all is right, or OURS."""
    for name in results:
        if error.startswith(f"AssertionError: {name}:"):
            return name
    for peer in results.keys() - {OURS}:
        rest = {name: result for name, result in results.items() if name != peer}
        if error_of_check(case, pristine, rest) is None:
            return peer
    return OURS


def input_sets(case: Case, pristine: Any, cache_bytes: int) -> list[Any]:
    """Copies to go through in turn, so that three times the cache is read before one comes again.

    Small inputs need more copies than are made: then they stay in the cache.
    """
    touched = max(1, int(sum(stage.num_bytes for stage in case.stages)) // 2)
    set_bytes = sum(t.numel() * t.element_size() for t in all_tensors(pristine))
    wanted = 1 + -(-3 * cache_bytes // touched)
    room = max(1, MOST_BYTES_OF_SETS // max(1, set_bytes))
    return [clone(pristine) for _ in range(min(wanted, room, MOST_SETS))]


def all_tensors(inputs: Any) -> Iterable[torch.Tensor]:
    """Every tensor of the inputs."""
    return [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]


def number_of_samples(clock: CudaTimer | WallTimer, each: float, ours: bool) -> int:
    """As many as fit, within limits; few of a slow peer, and of all in a rehearsal."""
    if isinstance(clock, WallTimer):
        return 2
    least = MIN_SAMPLES if ours or each < SLOW else FEW_SAMPLES
    return min(MAX_SAMPLES, max(least, int(SECONDS_PER_TIMING / max(each, 1e-7))))


class Contest:
    """Times the contenders of a case in two rounds, so that drifts of the clock meet all."""

    def __init__(
        self, case: Case, pristine: Any, names: Iterable[str], clock: CudaTimer | WallTimer
    ) -> None:
        """Makes the input sets."""
        self._case, self._pristine, self._clock = case, pristine, clock
        self._names = list(names)
        self._sets = input_sets(case, pristine, clock.cache_bytes())
        self.input_sets = len(self._sets)

    def eager(self) -> dict[str, Timing]:
        """Seconds of calls as Python makes them."""
        counts = {name: self._count(name) for name in self._names}
        seconds: dict[str, list[float]] = {name: [] for name in self._names}
        for _ in range(2):
            for name in self._names:
                half = (counts[name] + 1) // 2
                calls = [self._call(name, index) for index in range(half)]
                seconds[name] += self._clock.seconds(calls, self._between())
        return {name: summarize(values) for name, values in seconds.items()}

    def graph(self, outcome: Outcome) -> dict[str, Timing]:
        """Seconds per call when one graph calls each input set once; nothing is filled again."""
        timings = {}
        for name in self._names:
            if outcome.eager[name].median >= SLOW or name in COMPILED:
                continue  # launches do not count there; compiled code may capture by itself
            if (self._case.op, name) in NOT_CAPTURABLE:
                continue
            try:
                replay = self._clock.capture(
                    [self._call(name, index) for index in range(self.input_sets)]
                )
                once = self._clock.seconds([replay] * 2)[1]
                # At least MIN_SAMPLES replays of ours, within reason for many sets.
                calls = [replay] * number_of_samples(self._clock, once, name == OURS)
                seconds = self._clock.seconds(calls)
                timings[name] = summarize([each / self.input_sets for each in seconds])
                del replay, calls
            except Exception as error:
                outcome.errors[f"{name} (graph)"] = describe(error)
                self._clock.synchronize()
        return timings

    def peak_bytes(self) -> dict[str, int]:
        """Most extra memory of a call, what it returns included."""
        return {name: self._clock.peak_bytes(self._call(name, 0)) for name in self._names}

    def _call(self, name: str, index: int) -> Callable[[], Any]:
        run, inputs = self._case.contenders[name], self._sets[index % self.input_sets]
        return lambda: run(inputs)

    def _between(self) -> Callable[[int], None] | None:
        restore = self._case.restore
        if restore is None:
            return None
        # For every contender: the copies give Python time to enqueue the next call. It is the set
        # just used, so that the next one is the one that was left alone for longest.
        return lambda index: restore(self._sets[(index - 1) % self.input_sets], self._pristine)

    def _count(self, name: str) -> int:
        calls = [self._call(name, index) for index in range(3)]
        once = min(self._clock.seconds(calls)[1:])
        return number_of_samples(self._clock, once, name == OURS)


def run_case(case: Case, clock: CudaTimer | WallTimer) -> Outcome:
    """Checks, then times all contenders of a case."""
    outcome = Outcome(case.op, case.name, {}, {}, {}, {})
    torch.manual_seed(0)
    if any(name in case.contenders for name in COMPILED):
        torch.compiler.reset()
    # Not around the contenders: torch.compile cannot trace everything under a default device.
    with torch.device(clock.device):
        pristine = case.make_inputs()
    results = first_results(case, pristine, outcome)
    with torch.device(clock.device):
        check_results(case, pristine, results, outcome)
    names = list(results)
    del results
    if OURS not in names:
        return outcome
    contest = Contest(case, pristine, names, clock)
    outcome.input_sets = contest.input_sets
    outcome.peak_bytes = contest.peak_bytes()
    outcome.eager = contest.eager()
    outcome.graph = contest.graph(outcome)
    return outcome


def better(outcome: Outcome) -> dict[str, Timing]:
    """For every contender the better of its eager and its replayed calls."""
    return {
        name: min(timing, outcome.graph.get(name, timing), key=lambda t: t.median)
        for name, timing in outcome.eager.items()
    }


def as_json(case: Case, outcome: Outcome, ceilings: GpuCeilings | None, rehearsed: bool) -> Any:
    """The line of the report: bench.report.Row and both ways to call; no numbers if rehearsed."""
    head = {"op": outcome.op, "case": outcome.case, "errors": outcome.errors}
    if rehearsed:
        return {**head, "rehearsed": list(outcome.eager), "captured": list(outcome.graph)}
    if not outcome.eager:
        return head
    timings = {
        "eager": {name: asdict(timing) for name, timing in outcome.eager.items()},
        "graph": {name: asdict(timing) for name, timing in outcome.graph.items()},
    }
    head |= {"input_sets": outcome.input_sets, **timings}
    if ceilings is None:
        return head
    # The GPU is ours alone: no other process has a share of it.
    row = make_row(case, better(outcome), ceilings, outcome.peak_bytes, others=0.0)
    present = set(outcome.eager)
    row.goals = [goal.judge(row) for goal in case.goals if judgeable(goal, present)]
    return {**asdict(row), **head}


def judgeable(goal: Goal, present: set[str]) -> bool:
    """Whether the contenders that a goal speaks of were timed; a peer may have been wrong."""
    named = [name for name in ("eager", "topk + sort", "two passes") if name in goal.text]
    return all(name in present for name in named) and len(present) > ("best peer" in goal.text)


def main() -> None:
    """Runs the cases from `--first` on until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.cases", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ceilings", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    clock = timer(options.dry_run)
    measured = json.loads(options.ceilings.read_text()) if options.ceilings.exists() else None
    ceilings = GpuCeilings(**measured) if measured else None

    def write(line: Mapping[str, Any]) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()

    gc.freeze()  # what was imported stays: collections, also those before captures, take no time
    makers = make_cases(options.dry_run)
    for index, make in enumerate(makers):
        if index < options.first:
            continue
        with torch.device(clock.device):
            case = make()
        if time.monotonic() > end:
            write({"index": index, "not_run": str(case)})
            continue
        write({"index": index, "started": str(case)})
        try:
            row = as_json(case, run_case(case, clock), ceilings, options.dry_run)
        except Exception as error:
            row = {"op": case.op, "case": case.name, "errors": {OURS: describe(error)}}
        write({"index": index, "row": row})
        print(case, row.get("errors") or "", flush=True)
        gc.collect()
        if not options.dry_run:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                print(f"the device is lost: {describe(error)}", flush=True)
                os._exit(3)


if __name__ == "__main__":
    main()
