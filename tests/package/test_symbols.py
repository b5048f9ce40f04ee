"""What libkvevict.so needs from torch 2.11, and what it shows to others."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from kvevict._library import LIBRARY
from tests.package.support import Symbol, nm, parse_nm, run

DATA = Path(__file__).parent / "data"
# The C shims that torch 2.11.0 exports; the second list is only in a CUDA build of torch.
CPU_SHIMS = set((DATA / "torch211_libtorch_cpu_shims.txt").read_text().split())
CUDA_SHIMS = set((DATA / "torch211_libtorch_cuda_shims.txt").read_text().split())

UNDEFINED = {"U", "w", "v"}
# The marks that every linker adds, and weak references of the C runtime.
LINKER = {"_init", "_fini", "_edata", "_end", "__bss_start"}


def unmet(symbols: list[Symbol]) -> list[str]:
    """Return the needed symbols that some torch >= 2.11 does not have."""
    found = []
    for symbol in symbols:
        if symbol.type not in UNDEFINED:
            continue
        if re.search(r"\b(c10|at|torch|caffe2)::", symbol.name):
            found.append(f"{symbol.name} is C++, which is not stable")
        elif symbol.name.startswith(("aoti_torch_", "torch_")) and symbol.name not in CPU_SHIMS:
            if symbol.name not in CUDA_SHIMS:
                found.append(f"{symbol.name} is not in torch 2.11")
            elif symbol.type != "w":
                found.append(f"{symbol.name} is only in a CUDA torch and must be weak")
    return found


def exported(symbols: list[Symbol]) -> set[str]:
    return {s.name for s in symbols if s.type not in UNDEFINED and s.name not in LINKER}


def needed(readelf: str) -> set[str]:
    """Return the DT_NEEDED names of `readelf -d`, without versions."""
    return {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", readelf)}


def test_needs_only_the_stable_abi_of_torch_2_11() -> None:
    symbols = nm(LIBRARY, "-D")
    assert unmet(symbols) == []
    assert Symbol("U", "torch_library_impl") in symbols


def test_exports_only_build_info() -> None:
    assert exported(nm(LIBRARY, "-D")) == {"kvevict_build_info"}


def test_linked_libraries() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    names = needed(run(["readelf", "-d", LIBRARY]))
    assert {"libtorch", "libtorch_cpu"} <= names
    system = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}
    assert names - {"libtorch", "libtorch_cpu"} <= system


def test_a_planted_symbol_is_found() -> None:
    table = (
        "torch_library_impl U         \n"
        "aoti_torch_get_current_cuda_stream w         \n"
        "std::bad_alloc::what() const@GLIBCXX_3.4 U         \n"
        "kvevict_build_info T 1080 1a\n"
    )
    assert unmet(parse_nm(table)) == []
    assert exported(parse_nm(table)) == {"kvevict_build_info"}
    for bad in (
        "at::Tensor::numel() const U         \n",
        "torch_call_of_tomorrow U         \n",
        "aoti_torch_get_current_cuda_stream U         \n",
        "std::vector<c10::Scalar, std::allocator<c10::Scalar> >::clear() U         \n",
    ):
        assert len(unmet(parse_nm(table + bad))) == 1
    leak = "vtable for std::bad_optional_access V 1dcfc0 28\n"
    assert exported(parse_nm(table + leak)) > {"kvevict_build_info"}
    line = " 0x0000000000000001 (NEEDED)             Shared library: [libcudart.so.13]\n"
    assert needed(line) == {"libcudart"}
