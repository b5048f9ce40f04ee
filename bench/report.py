"""What a run has measured: rows, goals, the tables of the terminal and the README, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "kvevict"

# Part of the processor that other processes may have while a case is timed.
MOST_OF_OTHERS = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender.

    spread is the interquartile range over the median; halves are the medians of the first and the
    second half of the run; noisy says that another process disturbed more than half of the samples.
    """

    median: float
    spread: float
    halves: tuple[float, float]
    num_samples: int
    noisy: bool


@dataclass(frozen=True)
class Judged:
    """A goal, what was measured and whether that is enough."""

    goal: str
    measured: str
    met: bool


@dataclass
class Row:
    """One measured case. OURS is one of the contenders of timings and peak_bytes.

    others is the part of the processor that other processes had during the rounds.
    """

    op: str
    case: str
    timings: dict[str, Timing]
    floor_seconds: float
    compute_bound: bool
    flops: float
    num_bytes: float
    peak_bytes: dict[str, int]
    ceilings: dict[str, float]
    others: float
    goals: list[Judged] = field(default_factory=list)

    @property
    def noisy(self) -> bool:
        """Whether other processes were busy: then every time of the row is too long."""
        return self.others > MOST_OF_OTHERS

    @property
    def ours(self) -> Timing:
        """The operator under test."""
        return self.timings[OURS]

    @property
    def peers(self) -> dict[str, Timing]:
        """Everything else."""
        return {name: timing for name, timing in self.timings.items() if name != OURS}

    @property
    def fraction_of_floor(self) -> float:
        """1 is as fast as the hardware can be; for a compute-bound case, the fraction of peak."""
        return self.floor_seconds / self.ours.median

    @property
    def bytes_per_second(self) -> float:
        """Bytes that must be moved per second of ours."""
        return self.num_bytes / self.ours.median

    @property
    def flops_per_second(self) -> float:
        """Arithmetic that must be done per second of ours."""
        return self.flops / self.ours.median

    def times_faster(self, peer: str) -> float:
        """How often ours runs in the time of a peer."""
        return self.timings[peer].median / self.ours.median


@dataclass(frozen=True)
class Goal:
    """A speed that is aimed at; judged after the run, never asserted."""

    text: str
    measure: Callable[[Row], tuple[str, bool]]

    def judge(self, row: Row) -> Judged:
        """Holds a measured row against the goal."""
        measured, met = self.measure(row)
        return Judged(self.text, measured, met)


def times_faster(peer: str, factor: float) -> Goal:
    """At least `factor` times faster than a peer."""

    def measure(row: Row) -> tuple[str, bool]:
        ratio = row.times_faster(peer)
        return f"{ratio:.2f}x", ratio >= factor

    return Goal(f"{factor:g}x {peer}", measure)


def fraction_of_peak(fraction: float) -> Goal:
    """At least this part of the arithmetic peak measured in the same run."""

    def measure(row: Row) -> tuple[str, bool]:
        return f"{row.fraction_of_floor:.0%}", row.fraction_of_floor >= fraction

    return Goal(f"{fraction:.0%} of peak", measure)


def rate_or_fraction(gigabytes_per_second: float, fraction: float) -> Goal:
    """At least this rate, or this part of the memory ceiling measured in the same run."""

    def measure(row: Row) -> tuple[str, bool]:
        rate = row.bytes_per_second / 1e9
        met = rate >= gigabytes_per_second or row.fraction_of_floor >= fraction
        return f"{rate:.1f} GB/s, {row.fraction_of_floor:.0%}", met

    return Goal(f"{gigabytes_per_second:g} GB/s or {fraction:.0%} of NT copy", measure)


# --- JSON ----------------------------------------------------------------------------------------


@dataclass
class Report:
    """A whole run: the machine and the rows."""

    machine: dict[str, Any]
    rows: list[Row]

    def save(self, file: Path) -> None:
        """Writes JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(file: Path) -> Report:
        """Reads what `save` has written."""
        data = json.loads(file.read_text())
        data["rows"] = [row_from_json(row) for row in data["rows"]]
        return Report(**data)


def row_from_json(data: dict[str, Any]) -> Row:
    """A row as `asdict` has written it."""
    timings = {
        name: Timing(**{**timing, "halves": tuple(timing["halves"])})
        for name, timing in data["timings"].items()
    }
    goals = [Judged(**goal) for goal in data["goals"]]
    return Row(**{**data, "timings": timings, "goals": goals})


# --- tables --------------------------------------------------------------------------------------


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def format_bytes(number: float) -> str:
    """Three digits and a decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{_three_digits(number / scale)} {unit}"
    return f"{number:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def describe_ceilings(rows: Sequence[Row]) -> list[str]:
    """The machine's ceilings over the run, lowest to highest, and how quiet it was."""

    def span(name: str) -> str:
        values = [row.ceilings[name] / 1e9 for row in rows]
        return f"{min(values):.0f}-{max(values):.0f}"

    has_bf16_dot = rows[0].ceilings["has_bf16_dot"]
    bf16 = "vdpbf16ps" if has_bf16_dot else "no AVX-512-BF16: the fp32 peak stands in for"
    return [
        f"arithmetic: fp32 FMA {span('fp32_flops')}, {bf16} bf16 {span('bf16_flops')} GFLOP/s",
        f"memory: read {span('read_rate')}, copy {span('copy_rate')}, non-temporal copy "
        f"{span('nt_copy_rate')} GB/s, read and written counted",
        f"other processes used up to {max(row.others for row in rows):.0%} of the processor",
    ]


def describe_floor(row: Row) -> str:
    """The floor and how near ours comes to it."""
    if not row.floor_seconds:
        return "-"
    bound = "peak" if row.compute_bound else "floor"
    return f"{format_seconds(row.floor_seconds)} ({row.fraction_of_floor:.0%} of {bound})"


def describe_rate(row: Row) -> str:
    """What ours sustains in the unit that bounds it."""
    if not row.floor_seconds:
        return "-"
    if row.compute_bound:
        return f"{_three_digits(row.flops_per_second / 1e9)} GFLOP/s"
    return f"{_three_digits(row.bytes_per_second / 1e9)} GB/s"


def describe_time(row: Row, contender: str) -> str:
    """The median, marked where it is noisy."""
    timing = row.timings[contender]
    return ("~" if timing.noisy or row.noisy else "") + format_seconds(timing.median)


def describe_peer(row: Row, peer: str) -> str:
    """Time of a peer and how often ours runs meanwhile."""
    return f"{describe_time(row, peer)} ({row.times_faster(peer):.2f}x)"


def describe_memory(row: Row) -> str:
    """Peak extra memory of ours and of each peer, in the order of the contenders."""
    sizes = [format_bytes(size) for size in row.peak_bytes.values()]
    return " / ".join(sizes) or "-"


def describe_goals(row: Row) -> str:
    """Every goal with a mark; a missed one with what was measured."""
    return "  ".join(
        f"✓ {goal.goal}" if goal.met else f"✗ {goal.goal} ({goal.measured})" for goal in row.goals
    )


def op_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows of one operator."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    header = ["case", OURS, "spread", "floor", "rate", *peers, "peak extra memory", "goals"]
    cells = [
        [
            row.case,
            describe_time(row, OURS),
            f"{row.ours.spread:.0%}",
            describe_floor(row),
            describe_rate(row),
            *(describe_peer(row, peer) if peer in row.timings else "" for peer in peers),
            describe_memory(row),
            describe_goals(row),
        ]
        for row in rows
    ]
    return header, cells


def format_terminal(rows: Sequence[Row]) -> str:
    """One table per operator and the goals below it."""
    blocks = []
    for op, of_op in group_by_op(rows):
        header, cells = op_table(of_op)
        blocks.append("\n".join([op, *align(_without_empty_columns([header, *cells]))]))
    text = "\n\n".join(blocks)
    return f"{text}\n\n~ disturbed by other processes: measure again" if "~" in text else text


def group_by_op(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by operator, in the order of their first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.op, []).append(row)
    return list(groups.items())


def format_markdown(rows: Sequence[Row]) -> str:
    """The table of the README."""
    lines = [
        "| op | case | kvevict | of the floor | peers (how often slower) "
        "| peak extra memory: kvevict / peers | goals |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peers = ", ".join(f"{peer} {describe_peer(row, peer)}" for peer in row.peers)
        floor = f"{row.fraction_of_floor:.0%}" if row.floor_seconds else "-"
        goals = ", ".join(f"{goal.goal} {'✓' if goal.met else '✗'}" for goal in row.goals)
        cells = [f"`{row.op}`", row.case, describe_time(row, OURS), floor]
        lines.append("| " + " | ".join([*cells, peers, describe_memory(row), goals]) + " |")
    return "\n".join(lines)


def _without_empty_columns(table: Sequence[Sequence[str]]) -> list[list[str]]:
    columns = [c for c in zip(*table, strict=True) if any(cell not in ("", "-") for cell in c[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def align(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
