"""Compares two result files: `python -m bench.compare OLD.json NEW.json`.

A case is slower (or faster) only when the medians differ by more than the spreads of both runs; the
exit status is 1 where any is slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import Report, Row, align, format_seconds

# Differences below this are never called a change, however small the spreads are.
LEAST_CHANGE = 0.03


@dataclass(frozen=True)
class Change:
    """One case in both files."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """New time over old time: above 1 is slower."""
        return self.new.ours.median / self.old.ours.median

    @property
    def margin(self) -> float:
        """How far from 1 the ratio may be by chance."""
        return max(LEAST_CHANGE, self.old.ours.spread + self.new.ours.spread)

    @property
    def verdict(self) -> str:
        """slower, faster or same."""
        if self.ratio > 1 + self.margin:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.margin) else "same"


def match(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[Change], list[str], list[str]]:
    """Cases in both, only in the old and only in the new file."""
    before = {(row.op, row.case): row for row in old}
    after = {(row.op, row.case): row for row in new}
    both = [Change(before[key], after[key]) for key in before if key in after]
    gone = [" ".join(key) for key in before if key not in after]
    added = [" ".join(key) for key in after if key not in before]
    return both, gone, added


def format_changes(changes: Sequence[Change]) -> str:
    """A table of all cases."""
    header = ["op", "case", "old", "new", "new/old", "by chance", "verdict"]
    cells = [
        [
            change.old.op,
            change.old.case,
            format_seconds(change.old.ours.median),
            format_seconds(change.new.ours.median),
            f"{change.ratio:.2f}",
            f"{change.margin:.0%}",
            "" if change.verdict == "same" else change.verdict,
        ]
        for change in changes
    ]
    return "\n".join(align([header, *cells]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison; returns 1 where a case became slower."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = Report.load(options.old), Report.load(options.new)
    if (old.machine["cpu"], old.machine["threads"]) != (new.machine["cpu"], new.machine["threads"]):
        print("These runs are from different machines: ratios say nothing about the code.")
    changes, gone, added = match(old.rows, new.rows)
    print(format_changes(changes))
    for text, names in (("only in the old file", gone), ("only in the new file", added)):
        if names:
            print(f"{text}: {', '.join(names)}")
    slower = sum(change.verdict == "slower" for change in changes)
    print(f"{slower} of {len(changes)} cases became slower")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
