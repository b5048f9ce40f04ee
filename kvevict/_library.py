"""Loads ``lib/libkvevict.so`` and tells how it was built."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "lib" / "libkvevict.so"


class LibraryNotBuiltError(ImportError):
    """The compiled library is missing."""


def load() -> None:
    """Registers ``torch.ops.kvevict``.

    Raises:
        LibraryNotBuiltError: if the library was not built.
        ValueError: if ``KVEVICT_CPU_ISA`` names an instruction set that this machine lacks.
    """
    if not LIBRARY.exists():
        raise LibraryNotBuiltError(
            f"{LIBRARY} does not exist. Build it in the source tree with\n"
            "  pip install --no-build-isolation --use-pep517 -e .\n"
            "or, if kvevict is installed, start Python outside of the source tree."
        )
    torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    wanted = os.environ.get("KVEVICT_CPU_ISA")
    supported = build_info()["cpu_isa_supported"]
    if wanted and wanted not in supported:
        raise ValueError(f"KVEVICT_CPU_ISA must be one of {', '.join(supported)}, got {wanted}")


def build_info() -> dict[str, Any]:
    """How the library was built, and what it uses on this machine.

    Returns:
        ``version``, ``built_with_torch``, ``cpu_isa_built`` and ``cpu_isa_supported`` (instruction
        sets, weakest first), ``cpu_isa`` (the one in use), ``cuda_version`` (None without CUDA
        kernels), ``cuda_archs`` and ``no_cuda_reason`` (None with them).
    """
    function = ctypes.CDLL(str(LIBRARY)).kvevict_build_info
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function().decode())
    info["cuda_archs"] = info["cuda_archs"].split(",") if info["cuda_archs"] else []
    return info
