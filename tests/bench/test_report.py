"""Goals, tables, result files and their comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import compare, table
from bench.report import (
    OURS,
    Report,
    Row,
    Timing,
    format_bytes,
    format_markdown,
    format_seconds,
    format_terminal,
    fraction_of_peak,
    rate_or_fraction,
    times_faster,
)

MACHINE = {"cpu": "some cpu", "threads": 2, "torch": "2.13"}
CEILINGS = {
    "fp32_flops": 100e9,
    "bf16_flops": 200e9,
    "has_bf16_dot": True,
    "read_rate": 10e9,
    "copy_rate": 15e9,
    "nt_copy_rate": 20e9,
}


def row_of(
    seconds: float = 0.010,
    case: str = "A8",
    spread: float = 0.01,
    peer_seconds: float = 0.050,
    compute_bound: bool = True,
    others: float = 0.01,
) -> Row:
    def timing(median: float) -> Timing:
        return Timing(median, spread, (median, median), 30, False)

    return Row(
        op="score_keys",
        case=case,
        timings={OURS: timing(seconds), "eager": timing(peer_seconds)},
        floor_seconds=0.005,
        compute_bound=compute_bound,
        flops=2e9,
        num_bytes=3e8,
        peak_bytes={OURS: 0, "eager": 150_000_000},
        ceilings=CEILINGS,
        others=others,
    )


@pytest.mark.parametrize(
    ("goal", "measured", "met"),
    [
        (times_faster("eager", 5), "5.00x", True),
        (times_faster("eager", 5.5), "5.00x", False),
        (fraction_of_peak(0.5), "50%", True),
        (fraction_of_peak(0.65), "50%", False),
        (rate_or_fraction(28, 0.56), "30.0 GB/s, 50%", True),
        (rate_or_fraction(31, 0.45), "30.0 GB/s, 50%", True),
        (rate_or_fraction(31, 0.56), "30.0 GB/s, 50%", False),
    ],
)
def test_goals(goal: object, measured: str, met: bool) -> None:
    judged = goal.judge(row_of())
    assert (judged.measured, judged.met) == (measured, met)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (1.5e-7, "150 ns")],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1234, "1.23 kB"), (1.5e8, "150 MB"), (2e9, "2.00 GB")]
)
def test_bytes_are_readable(number: float, text: str) -> None:
    assert format_bytes(number) == text


def test_terminal_table_shows_everything() -> None:
    row = row_of()
    row.goals = [times_faster("eager", 5).judge(row), fraction_of_peak(0.65).judge(row)]
    text = format_terminal([row])
    for part in (
        "score_keys",
        "10.0 ms",
        "5.00 ms (50% of peak)",
        "200 GFLOP/s",
        "50.0 ms (5.00x)",
        "0 B / 150 MB",
        "✓ 5x eager",
        "✗ 65% of peak (50%)",
    ):
        assert part in text


def test_terminal_table_names_the_bound() -> None:
    text = format_terminal([row_of(compute_bound=False)])
    assert "50% of floor" in text
    assert "30.0 GB/s" in text


def test_terminal_table_leaves_out_empty_columns() -> None:
    assert "goals" not in format_terminal([row_of()])


def test_noisy_rows_are_marked() -> None:
    row = row_of()
    row.timings[OURS] = Timing(0.01, 0.5, (0.01, 0.02), 30, True)
    text = format_terminal([row])
    assert "~10.0 ms" in text
    assert "measure again" in text


def test_all_times_are_marked_where_others_were_busy() -> None:
    text = format_terminal([row_of(others=0.3)])
    assert "~10.0 ms" in text
    assert "~50.0 ms" in text


def test_markdown_has_one_line_per_row() -> None:
    lines = format_markdown([row_of(), row_of(case="A32")]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


def test_report_survives_json(tmp_path: Path) -> None:
    row = row_of()
    row.goals = [times_faster("eager", 5).judge(row)]
    report = Report(MACHINE, [row])
    file = tmp_path / "results" / "machine.json"
    report.save(file)
    assert Report.load(file) == report


@pytest.mark.parametrize(
    ("old", "new", "spread", "verdict"),
    [
        (1.0, 1.02, 0.0, "same"),
        (1.0, 1.05, 0.0, "slower"),
        (1.0, 1.05, 0.03, "same"),
        (1.05, 1.0, 0.0, "faster"),
        (1.0, 2.0, 0.3, "slower"),
    ],
)
def test_only_changes_beyond_the_spread_count(
    old: float, new: float, spread: float, verdict: str
) -> None:
    change = compare.Change(row_of(old, spread=spread), row_of(new, spread=spread))
    assert change.verdict == verdict


def test_cases_are_matched_by_name() -> None:
    old, new = [row_of(case="A8"), row_of(case="B")], [row_of(case="C"), row_of(case="A8")]
    both, gone, added = compare.match(old, new)
    assert [change.old.case for change in both] == ["A8"]
    assert (gone, added) == (["score_keys B"], ["score_keys C"])


@pytest.mark.parametrize(("seconds", "status"), [(0.010, 0), (0.020, 1)])
def test_compare_fails_where_a_case_became_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, status: int
) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    Report(MACHINE, [row_of(0.010)]).save(files[0])
    Report(MACHINE, [row_of(seconds)]).save(files[1])
    assert compare.main([str(file) for file in files]) == status
    assert f"{status} of 1 cases became slower" in capsys.readouterr().out


def test_compare_warns_of_different_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    Report(MACHINE, [row_of()]).save(files[0])
    Report(MACHINE | {"threads": 4}, [row_of()]).save(files[1])
    compare.main([str(file) for file in files])
    assert "different machines" in capsys.readouterr().out


def test_table_prints_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.json"
    Report(MACHINE, [row_of()]).save(file)
    table.main([str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith("some cpu, 2 threads, torch 2.13; ")
    assert "| `score_keys` | A8 | 10.0 ms | 50% |" in printed
