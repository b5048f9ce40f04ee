"""The tests marked every_isa once more, for every other instruction set that this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvevict

ROOT = Path(__file__).parents[2]
INFO = kvevict.build_info()
OTHER_ISAS = [isa for isa in INFO["cpu_isa_supported"] if isa != INFO["cpu_isa"]]


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KVEVICT_CPU_ISA": isa, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_isa(isa: str) -> None:
    finished = run(
        isa, "-m", "pytest", "-q", "-m", "every_isa", "-p", "no:cacheprovider", "tests/ops"
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.every_isa
def test_the_wanted_isa_is_used() -> None:
    wanted = os.environ.get("KVEVICT_CPU_ISA", INFO["cpu_isa_supported"][-1])
    assert INFO["cpu_isa"] == wanted


def test_an_unknown_isa_is_refused() -> None:
    finished = run("pentium", "-c", "import kvevict")
    assert finished.returncode != 0
    assert "KVEVICT_CPU_ISA must be one of baseline" in finished.stderr
