"""The GPU report's dry run, what it does with commands that break, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import table
from bench.gpu import cases, report
from bench.gpu.ceilings import GpuCeilings
from bench.gpu.timer import WallTimer
from bench.report import OURS
from bench.shapes import A32


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    report.main(["--out", str(out), "--dry-run", "--skip", "tests"])
    return out / "report.json"


def test_dry_run_takes_every_step(rehearsed: Path) -> None:
    data = json.loads(rehearsed.read_text())
    statuses = {step["name"]: step["status"] for step in data["steps"]}
    assert list(statuses) == [step.name for step in report.STEPS]
    assert set(statuses.values()) == {"ok", "rehearsed", "skipped"}
    assert [row["errors"] for row in data["rows"] if row["errors"]] == []
    assert all(OURS in row["rehearsed"] for row in data["rows"])
    assert len(data["rows"]) == len(cases.make_cases(dry_run=True))
    assert (rehearsed.parent / "log.txt").stat().st_size > 0


def test_dry_run_reports_no_number(rehearsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(rehearsed.read_text())
    assert data["dry_run"] is True
    assert data["gpu"] is None
    assert data["ceilings"] is None
    keys = {key for row in data["rows"] for key in row}
    assert keys == {"op", "case", "errors", "rehearsed", "captured"}
    table.main([str(rehearsed)])
    assert "no numbers" in capsys.readouterr().out


def test_a_command_that_hangs_or_fails(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    commands = [
        report.Command(
            [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
        ),
        report.Command([sys.executable, "-c", "raise SystemExit(3)"]),
        report.Command(["no-such-program"]),
        report.Command([sys.executable, "-c", "print('fine')"]),
    ]
    report.run_all(commands, 2.0, log)
    assert [c.status for c in commands] == ["timed out", "failed", "not available", "ok"]
    assert "begun" in commands[0].output
    assert "fine" in log.read_text()


def test_a_broken_case_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Case 1 of three kills the process, as an illegal memory access would.
    program = """
import json, os, sys
out, first = sys.argv[sys.argv.index("--out") + 1], int(sys.argv[sys.argv.index("--first") + 1])
for index in range(first, 3):
    with open(out, "a") as file:
        print(json.dumps({"index": index, "started": f"case {index}"}), file=file, flush=True)
        if index == 1:
            os._exit(3)
        row = {"op": "null", "case": str(index), "errors": {}}
        print(json.dumps({"index": index, "row": row}), file=file)
"""

    def fake(*arguments: str, **environment: str) -> report.Command:
        return report.Command([sys.executable, "-c", program, *arguments], environment)

    monkeypatch.setattr(report, "python", fake)
    run = report.Run(tmp_path, 1, dry_run=False)
    result = report.benchmarks(run, 30)
    assert [row["case"] for row in run.report["rows"]] == ["0", "2"]
    assert result["status"] == "failed"
    assert result["broken"] == [{"case": "case 1", "status": "failed"}]


def test_a_timed_case_becomes_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a dry run leaves out, here with the clock of the CPU and made-up ceilings."""
    data = gpu_report()
    data["rows"] = []
    at_most = GpuCeilings(bf16_flops=1e12, copy_rate=1e12)
    shape = cases.tiny(A32)
    for case in (
        cases.compact_kv(cases.for_moves(shape), 20),
        cases.score_keys(shape, given_lse=False),
        cases.score_keys(shape, given_lse=True),
        cases.select_topk(shape, 20),
        cases.score_and_compact(shape),
        cases.key_diversity(shape),
        cases.mix_scores(shape),
    ):
        outcome = cases.run_case(case, WallTimer())
        assert outcome.errors == {}
        row = cases.as_json(case, outcome, at_most, rehearsed=False)
        assert len(row["goals"]) == len(case.goals) > 0
        assert {OURS} <= set(row["graph"]) <= set(row["eager"])
        assert row["floor_seconds"] > 0
        assert "timings" not in cases.as_json(case, outcome, None, rehearsed=False)
        data["rows"].append(row)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(data))
    table.main([str(file), "--goals"])
    assert capsys.readouterr().out.count("| `") == 7


def test_a_wrong_peer_is_out_and_ours_is_never_timed_if_wrong() -> None:
    case = cases.select_topk(cases.tiny(A32), 20)
    wrong = cases.with_goals(
        cases.score_keys(cases.tiny(A32), given_lse=False), eager=lambda x: x["key"].sum() * 0
    )
    outcome = cases.run_case(wrong, WallTimer())
    assert set(outcome.errors) == {"eager"}
    assert set(outcome.eager) == {OURS, "two passes"}
    broken = cases.replace(case, contenders={**case.contenders, OURS: lambda scores: None})
    outcome = cases.run_case(broken, WallTimer())
    assert OURS in outcome.errors
    assert outcome.eager == {}


def gpu_report() -> dict[str, Any]:
    timing = {"median": 1e-5, "spread": 0.01, "halves": [1e-5, 1e-5]}
    timing |= {"num_samples": 30, "noisy": False}
    row = {
        "op": "compact_kv_",
        "case": "A8 20%",
        "timings": {OURS: timing, "gather": {**timing, "median": 3e-5}},
        "floor_seconds": 8e-6,
        "compute_bound": False,
        "flops": 0,
        "num_bytes": 32e6,
        "peak_bytes": {OURS: 0},
        "ceilings": {},
        "others": 0.0,
        "goals": [{"goal": "85% of peak", "measured": "80%", "met": False}],
        "eager": {OURS: timing},
        "graph": {},
        "input_sets": 3,
        "errors": {},
    }
    lost = {"op": "select_topk", "case": "C 5%", "errors": {OURS: "ValueError: wrong"}}
    return {
        "dry_run": False,
        "gpu": {"name": "NVIDIA H200", "driver_version": "580"},
        "versions": {"torch": "2.11"},
        "ceilings": {"copy_rate": 4.0e12, "bf16_flops": 7.9e14},
        "rows": [row, lost],
    }


def test_table_of_a_gpu_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "h200.json"
    file.write_text(json.dumps(gpu_report()))
    table.main([str(file)])
    text = capsys.readouterr().out
    assert "NVIDIA H200, driver 580, torch 2.11" in text
    assert "copy 4.00 TB/s" in text
    assert "| `compact_kv_` | A8 20% | 10.0 us | 80% | gather 30.0 us (3.00x) |" in text
    assert "Not timed: select_topk C 5%" in text
