"""Prints tables of measured numbers; the README's is `python -m bench.table --goals`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.report import Report, describe_ceilings, format_markdown

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
        report = Report.load(file)
        machine = report.machine
        print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; ", end="")
        print("; ".join(describe_ceilings(report.rows)) + ".\n")
        rows = [row for row in report.rows if row.goals or not options.goals]
        print(format_markdown(rows) + "\n")


if __name__ == "__main__":
    main()
