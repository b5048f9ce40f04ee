"""Prints tables of measured numbers; the README's is `python -m bench.table --goals`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.gpu.ceilings import describe
from bench.report import Report, Row, describe_ceilings, format_markdown, row_from_json

RESULTS = Path(__file__).with_name("results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints Markdown for the named file, or for every file in bench/results."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--goals", action="store_true", help="only the cases that have goals")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit("no results yet: run `pytest bench/ --save-results`")
    for file in files:
        data = json.loads(file.read_text())
        if "gpu" in data:
            print_gpu_report(data, options.goals)
            continue
        report = Report.load(file)
        machine = report.machine
        print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; ", end="")
        print("; ".join(describe_ceilings(report.rows)) + ".\n")
        rows = [row for row in report.rows if row.goals or not options.goals]
        print(format_markdown(rows) + "\n")


def print_gpu_report(data: Mapping[str, Any], only_goals: bool) -> None:
    """Prints what `bench.gpu.report` has written; what was not timed is named, not left out."""
    if data["dry_run"]:
        print(f"A rehearsal without a GPU: {len(data['rows'])} cases, no numbers.\n")
        return
    gpu, versions = data["gpu"] or {}, data["versions"]
    print(f"{gpu.get('name', 'no GPU')}, driver {gpu.get('driver_version')}, ", end="")
    print(f"torch {versions['torch']}; {describe(data['ceilings'] or {})}.\n")
    names = {field.name for field in fields(Row)}
    timed = [row for row in data["rows"] if "timings" in row]
    rows = [row_from_json({k: v for k, v in row.items() if k in names}) for row in timed]
    print(format_markdown([row for row in rows if row.goals or not only_goals]) + "\n")
    for row in data["rows"]:
        if "timings" not in row:
            print(f"Not timed: {row['op']} {row['case']}: {row['errors']}")


if __name__ == "__main__":
    main()
