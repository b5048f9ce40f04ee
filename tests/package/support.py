"""Subprocesses and symbol tables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Symbol:
    """One line of nm: `type` is its letter, `name` is demangled."""

    type: str
    name: str


def run(
    command: Sequence[str | Path], *, cwd: Path = ROOT, ok: bool = True, **environment: str
) -> str:
    """Run a command with this interpreter's tools on PATH; return what it printed.

    Nothing of kvevict's environment is inherited, and nothing that shows it the source tree.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KVEVICT_", "PYTHON"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (finished.returncode == 0) == ok, finished.stdout
    return finished.stdout


def parse_nm(output: str) -> list[Symbol]:
    """Read `nm -C --format=posix`: name type [value [size]], demangled names contain spaces."""
    symbols = []
    for line in output.splitlines():
        words = line.split(" ")
        for i in range(len(words) - 1, 0, -1):
            if len(words[i]) == 1 and words[i].isalpha():
                symbols.append(Symbol(words[i], " ".join(words[:i]).split("@")[0]))
                break
    return symbols


def nm(path: Path, *options: str) -> list[Symbol]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return parse_nm(run(["nm", "-C", "--format=posix", *options, path]))
