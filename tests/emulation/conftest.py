"""The emulator, if it was built."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.emulation.library import emulator as load_emulator
from tests.emulation.schedules import ALL_SCHEDULES, Schedule


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """Return _kvevict_emulator; skip without it."""
    module = load_emulator()
    if module is None:
        pytest.skip("not built: KVEVICT_EMULATION=ON pip install --no-build-isolation -e .")
    return module


@pytest.fixture(params=ALL_SCHEDULES, ids=str)
def every_schedule(request: pytest.FixtureRequest) -> Schedule:
    """Return one schedule after the other."""
    selected: Schedule = request.param
    return selected
