"""The module under test, if it was built."""

from __future__ import annotations

from types import ModuleType

import pytest

import kvevict


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """Return _kvevict_host; skip without it."""
    return pytest.importorskip(
        "tests.host._kvevict_host",
        reason="not built: KVEVICT_HOST_MODULE=ON pip install --no-build-isolation -e . "
        "(needs pybind11 and Python's headers)",
    )


@pytest.fixture(params=kvevict.build_info()["cpu_isa_supported"])
def isa(request: pytest.FixtureRequest) -> str:
    """Return the name of an instruction set of this CPU, one after the other."""
    name: str = request.param
    return name
