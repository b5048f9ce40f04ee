"""A smaller matrix with AddressSanitizer and UBSan, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.library import DIRECTORY

ROOT = Path(__file__).parents[2]
SUFFIX = "_asan"

pytestmark = pytest.mark.skipif(
    not (DIRECTORY / f"libkvevict_emulated{SUFFIX}.so").exists(),
    reason="not built: KVEVICT_EMULATION=ON KVEVICT_EMULATION_SANITIZE=ON pip install …",
)


def run(*arguments: str) -> tuple[int, str]:
    """Run Python with the libraries that must come first; return its output."""
    first = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter: or it finds no __cxa_throw
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KVEVICT_EMULATION_SUFFIX": SUFFIX,
        "CUDA_VISIBLE_DEVICES": "",
    }
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("tests", "selection"),
    [
        ("tests/emulation/test_emulator.py", "not mistakes and not misdeeds"),
        ("tests/emulation/test_schedules.py", "small"),
        ("tests/ops/test_every_op.py", "emulated and (not_written or any_strides)"),
        ("tests/ops/test_refusals.py", "emulated and safe_on_cuda"),
        (
            "tests/ops",
            "emulated and (smallest or odd or group_7 or sliced or transposed or holes or batch_0 "
            "or test_head_dims or test_edges or test_every_form or test_ragged or 65)",
        ),
    ],
)
def test_matrix(tests: str, selection: str) -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", selection)
    code, output = run("-m", "pytest", *options, tests)
    assert code == 0, output
    assert " passed" in output


@pytest.mark.parametrize(
    ("misdeed", "report"),
    [
        ("just_behind_shared", "AddressSanitizer: use-after-poison"),
        ("behind_global", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_load", "misaligned address"),
        ("null_pointer", "null pointer"),
    ],
)
def test_the_sanitizers_work(misdeed: str, report: str) -> None:
    program = f"""
from tests.emulation.library import emulator
emulator().misbehave({misdeed!r})
"""
    code, output = run("-c", program)
    assert code != 0
    assert report in output
