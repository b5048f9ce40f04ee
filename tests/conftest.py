"""Fixtures and reports shared by all tests."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from tests.support.backends import CPU, CUDA, EMULATED, Backend, available_backends

hypothesis.settings.register_profile("kvevict", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("kvevict")

# The tensors of tests are small: threads only cost. Tests of determinism choose their number.
torch.set_num_threads(1)

BACKENDS = available_backends()


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return the backend to test, one after the other."""
    selected: Backend = request.param
    return selected


@pytest.fixture(
    params=[backend for backend in BACKENDS if backend != EMULATED],
    ids=lambda backend: backend.name,
)
def traceable_backend(request: pytest.FixtureRequest) -> Backend:
    """Return the backends whose ops have fake kernels, one after the other."""
    selected: Backend = request.param
    return selected


@pytest.fixture(
    params=[backend for backend in BACKENDS if backend != CPU], ids=lambda backend: backend.name
)
def cuda_backend(request: pytest.FixtureRequest) -> Backend:
    """Return the backends that run the CUDA kernels, one after the other."""
    selected: Backend = request.param
    return selected


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what would have run on CUDA too, so that the summary can count it (xdist included)."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and any(value is CPU for value in callspec.params.values()):
            item.user_properties.append(("cuda_twin", True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many CUDA tests were not run; they count neither as passed nor as skipped."""
    if CUDA in BACKENDS:
        return
    twins = {
        report.nodeid
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and ("cuda_twin", True) in report.user_properties
    }
    if twins:
        terminalreporter.write_line(
            f"{len(twins)} CUDA tests were not run: this machine has no GPU, or this build no CUDA",
            yellow=True,
        )
