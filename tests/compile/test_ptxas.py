"""Every kernel compiles for every architecture without spills and within its registers."""

from __future__ import annotations

import pytest

from tests.compile.budgets import REGISTERS
from tests.compile.nvcc import (
    ARCHS,
    Resources,
    compile_all,
    demangle,
    parse_ptxas,
    readable,
    warnings_of,
)


def violations(kernel: str, resources: Resources) -> list[str]:
    """Return what is wrong with a kernel."""
    found = []
    if resources.stack or resources.spills:
        found.append(f"{resources.stack} bytes of stack, {resources.spills} bytes spilled")
    if resources.static_shared:
        found.append(f"{resources.static_shared} bytes of static shared memory")
    if kernel not in REGISTERS:
        found.append(f"{resources.registers} registers and no budget")
    elif resources.registers > REGISTERS[kernel]:
        found.append(f"{resources.registers} registers of {REGISTERS[kernel]}")
    return [f"{kernel}: {what}" for what in found]


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(arch: str) -> None:
    found: set[str] = set()
    seen = set()
    for cubin in compile_all(arch):
        log = cubin.with_suffix(".log").read_text()
        found.update(warnings_of(log))
        kernels = parse_ptxas(log)
        names = demangle(kernels)
        for name, resources in zip(names, kernels.values(), strict=True):
            found.update(violations(name, resources))
        seen.update(names)
    assert sorted(found) == []
    assert set(REGISTERS) - seen == set(), "budgets of kernels that are gone"


LOG = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 8 bytes stack, 400 bytes smem, 552 bytes cmem[0]
ptxas warning : Registers are spilled to local memory in function '_Z1fv'
"""


def test_a_log_is_understood() -> None:
    assert parse_ptxas(LOG) == {"_Z1fv": Resources(72, stack=8, spills=36, static_shared=400)}
    assert len(warnings_of(LOG)) == 1


def test_violations_are_found() -> None:
    assert violations("null_kernel", Resources(8, 0, 0, 0)) == []
    assert violations("null_kernel", Resources(255, 0, 0, 0))
    assert violations("null_kernel", Resources(8, stack=8, spills=0, static_shared=0))
    assert violations("null_kernel", Resources(8, 0, 0, static_shared=8))
    assert violations("new_kernel", Resources(8, 0, 0, 0))


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void kvevict::column_kernel<kvevict::TileShape<(kvevict::DType)2, 64, false>, "
            "(kvevict::Statistic)1, true>",
            "column_kernel<half, 64, true>",
        ),
        ("kvevict::(anonymous namespace)::null_kernel", "null_kernel"),
        ("void kvevict::move_rows_kernel<uint4, 128, false>", "move_rows_kernel<uint4>"),
    ],
)
def test_names(demangled: str, name: str) -> None:
    assert readable(demangled) == name
