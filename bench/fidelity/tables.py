"""Results as JSON, as Markdown and as a plot; joins those of several runs.

`python -m bench.fidelity.tables FILE.json … --out DIR` writes what `bench.fidelity.evaluate` would
have written of all their checkpoints and methods at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvevict.plotting import ACCENT, FAINT, INK, MUTED, require_matplotlib

CONTROLS = (
    "full",
    "text only",
    "random vision",
    "random vision per head",
    "needed removed",
    "oracle",
)
"""Rows that are controls, not methods."""

MAX_NAMED = 4
"""Methods that are named as near the best."""


@dataclass(frozen=True)
class Row:
    """One line of the result; intervals are 95%, over questions.

    Attributes:
        checkpoint: its folder's name.
        method: the name of the method.
        budget: what it was given, None where it takes none.
        exact_match: share of answers that are right as a whole.
        exact_match_interval: Wilson's.
        token_accuracy: mean share of the tokens behind the first that are right (words: F1).
        token_accuracy_interval: from the normal distribution.
        kept: mean measured fraction of keys that stay.
        recall: mean fraction of needed tokens kept, per layer.
        questions: how many.
    """

    checkpoint: str
    method: str
    budget: float | None
    exact_match: float
    exact_match_interval: tuple[float, float]
    token_accuracy: float
    token_accuracy_interval: tuple[float, float]
    kept: float
    recall: list[float]
    questions: int


def write_json(commands: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Write rows and the commands that measured them."""
    result = {"commands": [*commands], "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_tables(commands: Sequence[str], rows: Sequence[Row], out: Path) -> str:
    """Write `fidelity.json`, `.md` and `.png` to a folder; return the Markdown."""
    write_json(commands, rows, out / "fidelity.json")
    markdown = to_markdown(rows)
    (out / "fidelity.md").write_text(markdown)
    plot_accuracy(rows, out / "fidelity.png")
    return markdown


def join(files: Sequence[Path]) -> tuple[list[str], list[Row]]:
    """Return the commands and rows of several results, in the order of checkpoints and methods.

    What several of them measured is taken from the first.

    Raises:
        ValueError: if rows of a checkpoint were not taken over equally many questions.
    """
    results = [json.loads(file.read_text()) for file in files]
    rows: dict[tuple[str, str, float | None], Row] = {}
    for row in (Row(**fields) for result in results for fields in result["rows"]):
        rows.setdefault((row.checkpoint, row.method, row.budget), row)
    for checkpoint in {row.checkpoint for row in rows.values()}:
        counts = {row.questions for row in rows.values() if row.checkpoint == checkpoint}
        if len(counts) > 1:
            raise ValueError(
                f"bench.fidelity.tables: all rows of {checkpoint} must be of as many questions, "
                f"got {sorted(counts)}"
            )
    checkpoints = sorted({row.checkpoint for row in rows.values()})
    methods = _unique(row.method for row in rows.values())
    ordered = sorted(
        rows.values(), key=lambda r: (checkpoints.index(r.checkpoint), methods.index(r.method))
    )
    return _unique(command for result in results for command in result["commands"]), ordered


def to_markdown(rows: Sequence[Row]) -> str:
    """Return a table over all checkpoints, one of the best methods, and three for each."""
    checkpoints = _unique(row.checkpoint for row in rows)
    parts = []
    if len(checkpoints) > 1:
        title = f"Exact match in %, mean over {', '.join(checkpoints)} (lowest to highest)"
        parts.append(_table(title, rows, _over_checkpoints))
    parts.append(_best(rows, checkpoints))
    for checkpoint in checkpoints:
        own = [row for row in rows if row.checkpoint == checkpoint]
        count = own[0].questions
        parts += [
            _table(f"{checkpoint}: exact match in % [95% of {count} questions]", own, _exact_match),
            _table(f"{checkpoint}: tokens behind the first in % [95%]", own, _tokens),
            _table(f"{checkpoint}: kept in %; needed tokens kept in % by layer", own, _kept),
        ]
    return "\n".join(parts)


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _table(title: str, rows: Sequence[Row], cell: Callable[[list[Row]], str]) -> str:
    """Return a line per method and a column per budget; methods without a budget fill the last."""
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    columns = [*budgets, None] if any(row.budget is None for row in rows) else budgets
    heads = ["no budget" if budget is None else f"{budget:.0%}" for budget in columns]
    lines = []
    for method in _unique(row.method for row in rows):
        found = [[r for r in rows if (r.method, r.budget) == (method, b)] for b in columns]
        lines.append([method, *(cell(cells) if cells else "" for cells in found)])
    return _lay_out(title, ["method", *heads], lines)


def _best(rows: Sequence[Row], checkpoints: Sequence[str]) -> str:
    """Return the best methods of every checkpoint and budget, those of one standard error."""
    methods = [row for row in rows if row.budget is not None and row.method not in CONTROLS]
    budgets = sorted({row.budget for row in methods if row.budget is not None})
    heads = [f"{budget:.0%}" for budget in budgets]
    title = "Best method, exact match in % (and who is within one standard error of it)"
    lines = []
    for checkpoint in checkpoints:
        cells = []
        for budget in budgets:
            found = [r for r in methods if (r.checkpoint, r.budget) == (checkpoint, budget)]
            cells.append(_name_best(found) if found else "")
        lines.append([checkpoint, *cells])
    return _lay_out(title, ["checkpoint", *heads], lines)


def _name_best(rows: Sequence[Row]) -> str:
    best = max(rows, key=lambda row: row.exact_match)
    if best.exact_match == 0:
        return "none"
    error = math.sqrt(best.exact_match * (1 - best.exact_match) / best.questions)
    near = [r.method for r in rows if r is not best and r.exact_match >= best.exact_match - error]
    if len(near) > MAX_NAMED:
        near = [f"{len(near)} more"]
    others = f" ({', '.join(near)})" if near else ""
    return f"{best.method} {100 * best.exact_match:.1f}{others}"


def _lay_out(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in cells), ""])


def _over_checkpoints(rows: list[Row]) -> str:
    shares = [100 * row.exact_match for row in rows]
    return f"{sum(shares) / len(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})"


def _exact_match(rows: list[Row]) -> str:
    return _with_interval(rows[0].exact_match, rows[0].exact_match_interval)


def _tokens(rows: list[Row]) -> str:
    return _with_interval(rows[0].token_accuracy, rows[0].token_accuracy_interval)


def _with_interval(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:.1f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _kept(rows: list[Row]) -> str:
    recall = "/".join(f"{100 * layer:.0f}" for layer in rows[0].recall)
    return f"{100 * rows[0].kept:.1f}" + (f"; {recall}" if recall else "")


def plot_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Draw exact match against the measured kept fraction, a panel per method, as a PNG.

    Bold: the mean over checkpoints; thin: each of them; dashed: the oracle, the mean.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = sorted({row.budget for row in rows if row.budget is not None})
    with_budget = [row for row in rows if row.budget is not None]
    methods = [m for m in _unique(row.method for row in with_budget) if m != "oracle"]
    num_columns = min(5, len(methods))
    num_rows = math.ceil(len(methods) / num_columns)
    figure, grid = plt.subplots(
        num_rows,
        num_columns,
        figsize=(2.7 * num_columns, 2.2 * num_rows + 0.5),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    oracle = _mean_curve(with_budget, "oracle")
    for axes, method in zip(grid.flat, methods, strict=False):
        axes.plot(*oracle, color=MUTED, linestyle="--", linewidth=1)
        for checkpoint in _unique(row.checkpoint for row in rows):
            curve = [r for r in with_budget if (r.checkpoint, r.method) == (checkpoint, method)]
            kept = [100 * row.kept for row in curve]
            axes.plot(kept, [100 * row.exact_match for row in curve], color=ACCENT, linewidth=0.8)
        axes.plot(*_mean_curve(with_budget, method), color=INK, marker="o", markersize=3)
        axes.set_title(method, fontsize=9 if len(method) < 25 else 6)
        axes.set_xscale("log")
        axes.set_xticks([100 * budget for budget in budgets])
        axes.set_xticklabels([f"{100 * budget:g}" for budget in budgets], fontsize=7)
        axes.minorticks_off()
        axes.grid(color=FAINT)
    for axes in grid.flat[len(methods) :]:
        axes.axis("off")
    figure.supxlabel("keys kept, % (measured)", fontsize=9)
    figure.supylabel("exact match, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean_curve(rows: Sequence[Row], method: str) -> tuple[list[float], list[float]]:
    """Return kept and exact match in percent, the means over checkpoints, budget by budget."""
    own = [row for row in rows if row.method == method]
    groups = [[r for r in own if r.budget == b] for b in sorted({r.budget or 0.0 for r in own})]
    kept = [100 * sum(row.kept for row in group) / len(group) for group in groups]
    return kept, [100 * sum(row.exact_match for row in group) / len(group) for group in groups]


def main(argv: Sequence[str] | None = None) -> int:
    """Join results; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=Path("fidelity-out"), metavar="DIR")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    print(write_tables(*join(args.files), args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
