"""The choice of CMakeLists.txt with or without CUDA."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.package.support import ROOT, run

if shutil.which("g++") is None:
    pytest.skip("the build tests need g++", allow_module_level=True)


def configure(build: Path, *options: str, python: str = sys.executable, ok: bool = True) -> str:
    where = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython3_EXECUTABLE={python}"]
    return run(["cmake", *where, *options], ok=ok)


def test_without_cuda(tmp_path: Path) -> None:
    printed = configure(tmp_path, "-DKVEVICT_CUDA=OFF", "-DKVEVICT_VERSION=1.2.3")
    reason = "built with KVEVICT_CUDA=OFF"
    assert f"kvevict: no CUDA kernels, {reason}" in printed
    assert ".cu" not in (tmp_path / "compile_commands.json").read_text()

    # build_info.cpp and isa.cpp know nothing of torch: they make a library of their own.
    names = ("build_info", "isa")
    objects = [f"CMakeFiles/kvevict.dir/csrc/binding/{name}.cpp.o" for name in names]
    run(["ninja", *objects], cwd=tmp_path)
    run(["g++", "-shared", "-o", "info.so", *objects], cwd=tmp_path)
    build_info = ctypes.CDLL(str(tmp_path / "info.so")).kvevict_build_info
    build_info.restype = ctypes.c_char_p
    info = json.loads(build_info())
    assert info["version"] == "1.2.3"
    assert info["cuda_version"] is None and info["no_cuda_reason"] == reason


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    printed = configure(tmp_path, "-DKVEVICT_CUDA=MAYBE", ok=False)
    assert "KVEVICT_CUDA must be AUTO, ON or OFF, got MAYBE" in " ".join(printed.split())


def test_no_torch_is_said_plainly(tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    python = f"{tmp_path}/venv/bin/python"
    printed = configure(tmp_path / "build", "-DKVEVICT_CUDA=OFF", python=python, ok=False)
    assert "pip install torch first" in " ".join(printed.split())
