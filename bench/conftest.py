"""Options, fixtures, and the report at the end of a benchmark session."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

import kvevict
from bench import ceilings, memory
from bench.harness import Case, run_case
from bench.report import Report, Row, describe_ceilings, format_terminal

RESULTS = Path(__file__).with_name("results")


class Session:
    """The rows measured so far, and the peak memory of all cases, measured before the first."""

    def __init__(self, cases: list[tuple[str, Case]], with_memory: bool) -> None:
        """Takes the cases that will run, by module."""
        self.rows: list[Row] = []
        self.peak_bytes = memory.measure(cases) if with_memory else {}


SESSION = pytest.StashKey[Session]()


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "cpu": ceilings.cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": ceilings.last_level_cache_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kvevict": kvevict.build_info(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def hardware_key() -> str:
    """File name of the results of this machine."""
    words = f"{ceilings.cpu_name()} {torch.get_num_threads()} threads".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds our options."""
    group = parser.getgroup("kvevict benchmarks")
    group.addoption(
        "--save-results",
        action="store_true",
        help="write bench/results/<hardware-key>.json",
    )
    group.addoption(
        "--case-seconds",
        type=float,
        default=2.0,
        help="time to spend on the rounds of one case (default: 2)",
    )
    group.addoption(
        "--no-memory",
        action="store_true",
        help="do not measure peak extra memory (saves about a minute)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Our report takes the place of pytest-benchmark's table; -v shows that, too."""
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every benchmark runs the CASES of its module."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.CASES, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """Shared by all cases of the run."""
    config = request.config
    cases = [
        (item.module.__name__, item.callspec.params["case"])
        for item in request.session.items
        if "case" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    disabled = config.getoption("benchmark_disable")
    config.stash[SESSION] = Session(cases, not (disabled or config.getoption("no_memory")))
    return config.stash[SESSION]


@pytest.fixture
def run(request: pytest.FixtureRequest, session: Session, benchmark: Any) -> Callable[[Case], None]:
    """Checks and times one case."""

    def run_and_keep(case: Case) -> None:
        row = run_case(
            case,
            benchmark,
            session.peak_bytes.get(str(case), {}),
            request.config.getoption("case_seconds"),
        )
        if row is not None:
            session.rows.append(row)

    return run_and_keep


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the report, and saves it where asked."""
    if SESSION not in config.stash or not config.stash[SESSION].rows:
        return
    report = Report(describe_machine(), config.stash[SESSION].rows)
    machine = report.machine
    write = terminalreporter.write_line
    terminalreporter.section("kvevict benchmarks")
    write(
        f"{machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python']}"
    )
    for line in describe_ceilings(report.rows):
        write(line)
    write("Medians of interleaved rounds; (x) says how often kvevict runs in the time of the peer.")
    write("Peak extra memory in the order of the columns, results included.\n")
    write(format_terminal(report.rows))
    if config.getoption("save_results"):
        file = RESULTS / f"{hardware_key()}.json"
        report.save(file)
        write(f"\nsaved {file}")
