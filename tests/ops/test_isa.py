"""The tests marked every_isa, once for every instruction set that this CPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvevict

ROOT = Path(__file__).parents[2]
ISAS = kvevict.build_info()["cpu_isa_supported"]


def run(isa: str, *command: str) -> str:
    environment = {**os.environ, "KVEVICT_CPU_ISA": isa, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa: str) -> None:
    info = run(isa, "-c", "import json, kvevict; print(json.dumps(kvevict.build_info()))")
    assert json.loads(info)["cpu_isa"] == isa
    report = run(
        isa, "-m", "pytest", "-q", "-m", "every_isa", "-p", "no:cacheprovider", "tests/ops"
    )
    assert " passed" in report and "failed" not in report


def test_the_best_isa_is_the_default() -> None:
    assert ISAS[0] == "baseline"
    if "KVEVICT_CPU_ISA" not in os.environ:
        assert kvevict.build_info()["cpu_isa"] == ISAS[-1]
