"""The machine code of sm_90a uses the instructions that the kernels are built on."""

from __future__ import annotations

import functools
import re

import pytest

from tests.compile.nvcc import compile_all, demangle, disassemble

ASYNC_COPY_16 = r"LDGSTS\.\S*\b128"
LOAD_16 = r"LDG\.\S*\b128"
STORE_16 = r"STG\.\S*\b128"
SHARED_LOAD_16 = r"LDS\.\S*\b128"
LDMATRIX = r"LDSM\.16\.M88\.4"
TENSOR_CORE = r"HMMA\.16816\.F32"

ATTENTION = r"(row_normalizer|column|max_of_means)_kernel"
EXPECTED = {
    ATTENTION + "<half": [TENSOR_CORE, LDMATRIX, ASYNC_COPY_16],
    ATTENTION + "<float": ["FFMA", SHARED_LOAD_16, ASYNC_COPY_16],
    r"evict_slots_kernel<uint4": [LOAD_16, STORE_16],
    r"move_rows_kernel<uint4": [ASYNC_COPY_16, STORE_16],
    r"rerotate_keys_kernel<(float, 4|half, 8)": [LOAD_16, STORE_16],
    r"select_short_kernel": [LOAD_16, SHARED_LOAD_16],
    r"(sum_unit|compare)_keys_kernel": [LOAD_16],
}


@functools.cache
def machine_code() -> list[tuple[str, str]]:
    """Return name and SASS of every kernel."""
    code: list[tuple[str, str]] = []
    for cubin in compile_all("90a"):
        kernels = disassemble(cubin)
        code += zip(demangle(kernels), kernels.values(), strict=True)
    return code


@pytest.mark.parametrize("kernels", EXPECTED)
def test_has_instructions(kernels: str) -> None:
    found = [(name, code) for name, code in machine_code() if re.match(kernels, name)]
    assert found
    assert [
        f"{name} has no {instruction}"
        for name, code in found
        for instruction in EXPECTED[kernels]
        if not re.search(instruction, code)
    ] == []


def test_local_memory_is_not_used() -> None:
    assert [name for name, code in machine_code() if re.search(r"\b(LDL|STL)\b", code)] == []


def test_float32_is_not_rounded_to_tf32() -> None:
    assert [name for name, code in machine_code() if "TF32" in code] == []
