"""Who may know whom: kernels, bindings, ops, oracles, policies, integrations."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch

import pytest

from tests.structure.tree import (
    cpp_code,
    cpp_includes,
    files,
    python_attributes,
    python_imports,
    read,
)

KERNEL_FILES = (
    "csrc/core/*",
    "csrc/cuda/*",
    "csrc/ops/*/*.h",
    "csrc/ops/*/*_cpu.cpp",
    "csrc/ops/*/*_cuda.cu",
)
BINDING_FILES = ("csrc/binding/*", "csrc/ops/*/*_torch.cpp")

# No header that allocates, throws or talks to the system.
KERNEL_STD = {
    *("algorithm", "array", "cmath", "cstddef", "cstdint", "cstring", "limits", "tuple"),
    *("type_traits", "utility"),
}
KERNEL_WORDS = re.compile(r"\b(malloc|calloc|realloc|aligned_alloc|getenv|new|throw|try)\b")


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def allowed_in_kernel(path: str, include: str) -> bool:
    on_cuda = path.startswith("csrc/cuda/") or path.endswith("_cuda.cu")
    in_op = path.startswith("csrc/ops/")
    if include.startswith("core/"):
        return not (on_cuda and include.startswith("core/cpu/"))
    if include.startswith("ops/"):
        return in_op
    if include.startswith("cuda"):  # cuda/launch.h, cuda_runtime.h
        return on_cuda
    if include == "immintrin.h":
        return path.startswith("csrc/core/cpu/") or path.endswith("_cpu.cpp")
    return include in KERNEL_STD


def allowed_in_binding(include: str) -> bool:
    ours = include.startswith(("binding/", "core/", "ops/")) and include != "core/cpu/simd.h"
    stable = include.startswith(("torch/csrc/stable/", "torch/headeronly/"))
    return ours or stable or re.fullmatch(r"[a-z_]+", include) is not None


def cpp_violations(path: str, text: str) -> list[str]:
    if matches(path, BINDING_FILES):
        return [f"{path}: {i}" for i in cpp_includes(text) if not allowed_in_binding(i)]
    if matches(path, KERNEL_FILES):
        includes = [i for i in cpp_includes(text) if not allowed_in_kernel(path, i)]
        words = KERNEL_WORDS.findall(cpp_code(text))
        return [f"{path}: {found}" for found in includes + words]
    return [f"{path}: belongs to no layer"]


def under(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_std(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


# What kvevict/ops may take from torch: types, fake tensors and the ops themselves; no computing.
OPS_TORCH = re.compile(
    r"torch\.(ops(\.kvevict(\.\w+)?)?|library(\.register_fake)?|empty(_like)?|Sym(Int|Bool)|Tensor"
    r"|Size|_check_value|dtype|device|contiguous_format|bool|u?int\d+|b?float\d+)"
)
OPS_STD = ("__future__", "typing", "collections.abc", "enum", "math")


def python_violations(path: str, text: str) -> list[str]:
    imports, attributes = python_imports(text), python_attributes(text)
    bad: list[str] = []
    if path.startswith("kvevict/ops/"):
        allowed = (*OPS_STD, "torch", "kvevict.ops", "kvevict._library")
        bad += [name for name in imports if not under(name, *allowed)]
        bad += [a for a in attributes if a.startswith("torch.") and not OPS_TORCH.fullmatch(a)]
    elif path.startswith("kvevict/reference/"):
        allowed = ("torch", "kvevict.ops.enums", "kvevict.reference")
        bad += [name for name in imports if not under(name, *allowed) and not is_std(name)]
    elif path.startswith("kvevict/policies/"):
        ours = ("kvevict.ops", "kvevict.priority", "kvevict.slots", "kvevict.policies")
        allowed = ("torch", *ours)
        bad += [name for name in imports if not under(name, *allowed) and not is_std(name)]
        moves = ("topk", "gather", "index_select", "take_along_dim", "cuda")
        bad += [a for a in attributes if a.split(".")[-1] in moves]
    elif path.startswith("kvevict/integrations/"):
        kernels = ("kvevict.ops", "kvevict.reference", "kvevict._library", "torch.ops")
        bad += [name for name in imports + attributes if under(name, *kernels)]
    may_know_transformers = path.startswith("kvevict/integrations/") or path == "kvevict/demo.py"
    if not may_know_transformers:
        bad += [name for name in imports if under(name, "transformers")]
    return [f"{path}: {name}" for name in bad]


def violations(path: str, text: str) -> list[str]:
    return (cpp_violations if path.startswith("csrc/") else python_violations)(path, text)


def test_layers() -> None:
    found: list[str] = []
    for path in files():
        if path.startswith("csrc/") or (path.startswith("kvevict/") and path.endswith(".py")):
            found += violations(path, read(path))
    assert found == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/core/order.h", "#include <torch/csrc/stable/tensor.h>"),
        ("csrc/core/order.h", '#include "binding/check.h"'),
        ("csrc/core/order.h", '#include "ops/null/null.h"'),
        ("csrc/core/order.h", "#include <vector>"),
        ("csrc/core/cpu/isa.h", "#include <stdexcept>"),
        ("csrc/cuda/launch.h", '#include "core/cpu/simd.h"'),
        ("csrc/cuda/launch.h", "  #  include <c10/cuda/CUDAStream.h>"),
        ("csrc/ops/null/null.h", '#include "cuda/launch.h"'),
        ("csrc/ops/null/null_cpu.cpp", "auto* p = new float[8];"),
        ("csrc/ops/null/null_cpu.cpp", 'const char* isa = std::getenv("ISA");'),
        ("csrc/ops/null/null_cuda.cu", "void* p = malloc(8);"),
        ("csrc/ops/null/null_cuda.cu", 'throw "no memory";'),
        ("csrc/ops/null/null_torch.cpp", "#include <ATen/ATen.h>"),
        ("csrc/ops/null/null_torch.cpp", "#include <torch/extension.h>"),
        ("csrc/ops/null/null_torch.cpp", '#include "cuda/launch.h"'),
        ("csrc/binding/check.cpp", "#include <cuda_runtime.h>"),
        ("csrc/binding/check.cpp", '#include "core/cpu/simd.h"'),
        ("csrc/ops/null/null_metal.mm", ""),
        ("kvevict/ops/null.py", "from kvevict import reference"),
        ("kvevict/ops/null.py", "import numpy"),
        ("kvevict/ops/null.py", "x = torch.softmax(query, -1)"),
        ("kvevict/reference/null.py", "from kvevict.ops import null"),
        ("kvevict/reference/null.py", "import kvevict"),
        ("kvevict/policies/snapkv.py", "from kvevict.reference import score_keys"),
        ("kvevict/policies/snapkv.py", "def f():\n  import transformers"),
        ("kvevict/policies/snapkv.py", "torch.topk(scores, 3)"),
        ("kvevict/policies/snapkv.py", "key = key.clone().gather(2, index)"),
        ("kvevict/policies/snapkv.py", "key[0].index_select(0, index)"),
        ("kvevict/integrations/transformers.py", "from kvevict.ops import compact_kv_"),
        ("kvevict/integrations/transformers.py", "torch.ops.kvevict.null(x)"),
        ("kvevict/priority.py", "from transformers import Cache"),
        ("kvevict/__init__.py", "import transformers.cache_utils"),
    ],
)
def test_a_broken_layer_is_found(path: str, line: str) -> None:
    assert violations(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/core/order.h", "// new keys are never thrown away by malloc or getenv"),
        ("csrc/core/order.h", "#include <cstdint>"),
        ("csrc/ops/null/null_cpu.cpp", '#include "core/cpu/simd.h"'),
        ("csrc/ops/null/null_cuda.cu", '#include "cuda/launch.h"'),
        ("csrc/ops/null/null_torch.cpp", "#include <torch/headeronly/util/Half.h>"),
        ("kvevict/ops/null.py", "output = torch.ops.kvevict.null(input)"),
        ("kvevict/reference/null.py", "import torch.nn.functional"),
        ("kvevict/policies/snapkv.py", "ops.gather_kv(keys, values, ops.select_topk(s, 3)[0])"),
        ("kvevict/demo.py", "import transformers"),
    ],
)
def test_a_right_layer_is_not_blamed(path: str, line: str) -> None:
    assert violations(path, line) == []
