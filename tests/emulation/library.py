"""Loads what tests/emulation/CMakeLists.txt builds, if it was built."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

DIRECTORY = Path(__file__).parent / "lib"
SUFFIX = os.environ.get("KVEVICT_EMULATION_SUFFIX", "")  # "_asan": the build with sanitizers


@functools.cache
def emulator() -> ModuleType | None:
    """Return the module with the emulator's controls."""
    name = f"_kvevict_emulator{SUFFIX}"
    if not any(DIRECTORY.glob(f"{name}.*")):
        return None
    return importlib.import_module(f"tests.emulation.lib.{name}")


@functools.cache
def load_ops() -> bool:
    """Register torch.ops.kvevict_emulated; return whether there is one."""
    usual = DIRECTORY / f"libkvevict_emulated{SUFFIX}.so"
    library = Path(os.environ.get("KVEVICT_EMULATED_OPS", usual))  # mutate.py has others
    if not library.exists():
        return False
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    return True
