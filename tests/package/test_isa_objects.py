"""Code of one instruction set must not reach a machine that lacks it.

A function that a kernel's object file defines weakly (an inline function or a template of a shared
header that was not inlined) exists once per object, and the linker keeps any one of them: perhaps
the AVX-512 one, for baseline callers too. So kernels may define only names of their own ISA.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.package.support import ROOT, Symbol, nm, parse_nm, run

BUILD = ROOT / "build" / "editable"
ISAS = re.findall(
    r"\w+", re.search(r"enum class Isa.*\{(.*)\}", (ROOT / "csrc/core/cpu/isa.h").read_text())[1]
)
# Vector registers that an instruction set does not have.
REGISTERS = {"baseline": r"%[yz]mm", "avx2": r"%zmm"}


def shared_names(isa: str, symbols: list[Symbol]) -> list[str]:
    """Return the symbols that do not carry the instruction set in their name."""
    own = re.compile(rf"\bkvevict::{isa}::|\(kvevict::Isa\){ISAS.index(isa)}\b")
    return [symbol.name for symbol in symbols if not own.search(symbol.name)]


def kernel_objects() -> list[tuple[str, Path]]:
    """Return (ISA, object file) for every CPU kernel of the editable build."""
    commands = BUILD / "compile_commands.json"
    if not commands.exists():
        return []
    found = []
    for entry in json.loads(commands.read_text()):
        isa = re.search(r"-DKVEVICT_ISA=(\w+)", entry["command"])
        path = BUILD / entry["output"]
        if isa and entry["file"].endswith("_cpu.cpp") and path.exists():
            found.append((isa[1], path))
    return found


@pytest.fixture(scope="module")
def objects() -> list[tuple[str, Path]]:
    found = kernel_objects()
    if not found:
        pytest.skip("there is no editable build in build/editable")
    return found


def test_kernels_define_only_names_of_their_isa(objects: list[tuple[str, Path]]) -> None:
    assert {isa for isa, _ in objects} == set(ISAS)
    leaks = {
        f"{path.name} for {isa}": names
        for isa, path in objects
        if (names := shared_names(isa, nm(path, "--defined-only", "--extern-only")))
    }
    assert leaks == {}


def test_kernels_use_only_registers_of_their_isa(objects: list[tuple[str, Path]]) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    for isa, path in objects:
        if isa in REGISTERS:
            code = run(["objdump", "-d", "--no-show-raw-insn", path])
            assert not re.search(REGISTERS[isa], code), f"{path.name} for {isa}"


def test_a_leak_is_found() -> None:
    own = (
        "void kvevict::Null::run_cpu<(kvevict::Isa)2>(kvevict::CpuWork const&) T 0 40\n"
        "kvevict::avx512::exp2(float __vector(16)) W 0 40\n"
    )
    assert shared_names("avx512", parse_nm(own)) == []
    assert len(shared_names("avx512_bf16", parse_nm(own))) == 2
    for leak in ("kvevict::order_key(float) W 0 40\n", "void std::sort<int*>(int*, int*) W 0 9\n"):
        assert len(shared_names("avx512", parse_nm(own + leak))) == 1
