"""What stands in for the kernels' headers has the same functions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTION = re.compile(r"^(?:\w[\w:<>*& ]*[ &*])?(\w+)\((.*?)\)\s*\{", re.MULTILINE | re.DOTALL)
ONLY_ON_A_GPU = {"shared_address"}


def functions(path: Path) -> dict[str, str]:
    """Return the parameters of every function, by name."""
    code = re.sub(r"//.*", "", path.read_text()).replace("__device__ __forceinline__ ", "inline ")
    return {name: " ".join(text.split()) for name, text in FUNCTION.findall(code)}


@pytest.mark.parametrize("header", ["cuda/ptx.h"])
def test_same_functions(header: str) -> None:
    real = functions(ROOT / "csrc" / header)
    emulated = functions(ROOT / "tests/emulation/include" / header)
    assert len(real) > 5
    assert {name: real[name] for name in real if name not in ONLY_ON_A_GPU} == emulated
