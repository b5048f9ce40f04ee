"""Compiles the kernels for real GPUs and reads what ptxas and the disassembler say of them."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "ptxas"
ARCHS = ("80", "90a")  # about 30 s each on two cores
if os.environ.get("KVEVICT_ALL_ARCHS") == "1":
    ARCHS = ("80", "86", "89", "90a", "100", "120")
OPTIONS = ("-std=c++20", "-O3", "-Xptxas", "-v,-warn-spills", "-cubin")
PROCESSES = 2
MISSING = "pip install --no-deps -r third_party/"


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel, in bytes but for the registers."""

    registers: int
    stack: int
    spills: int
    static_shared: int


def find_tool(name: str) -> str | None:
    """Return the path of a CUDA tool: from PATH, a toolkit or the wheels of NVIDIA."""
    bins = [os.environ["CUDA_HOME"] + "/bin"] if "CUDA_HOME" in os.environ else []
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        bins += [str(path.parent) for path in Path(folder).glob(f"*/bin/{name}")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(bins))


def find_nvcc() -> str:
    """Return the path of nvcc; skip without it."""
    nvcc = os.environ.get("CUDACXX") or find_tool("nvcc")
    if nvcc is None:
        pytest.skip(f"no nvcc on PATH, in CUDA_HOME or CUDACXX: {MISSING}cuda-requirements.txt")
    return nvcc


def kernel_files() -> list[Path]:
    return sorted(CSRC.glob("ops/*/*_cuda.cu"))


def files_of(source: Path) -> set[Path]:
    """Return a file and all that it includes of csrc, directly or not."""
    found, todo = set(), [source]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
            todo += [CSRC / name for name in names]
    return found


def key_of(source: Path, nvcc: str) -> str:
    """Return a hash of all that a compilation may depend on."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + repr(OPTIONS).encode())
    for path in sorted(files_of(source)):
        digest.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_one(source: Path, arch: str, nvcc: str) -> Path:
    """Return the cubin of a file; its log, of the compiler, lies next to it."""
    stem = f"{source.stem}.sm_{arch}"
    cubin = CACHE / f"{stem}.{key_of(source, nvcc)}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for stale in CACHE.glob(f"{stem}.*"):
            stale.unlink()
        command = [nvcc, *OPTIONS, f"-arch=sm_{arch}", "-I", "csrc", str(source), "-o", str(cubin)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        log.write_text(done.stdout + done.stderr)
    return cubin


@functools.cache
def compile_all(arch: str) -> list[Path]:
    """Return the cubins of all kernels."""
    nvcc = find_nvcc()
    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(lambda source: compile_one(source, arch, nvcc), kernel_files()))


def demangle(mangled: Iterable[str]) -> list[str]:
    """Return readable names of kernels: `column_kernel<half, 128, true>`."""
    command = ["c++filt", "--no-params", *mangled]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [readable(name) for name in done.stdout.splitlines()]


def readable(name: str) -> str:
    """Shorten a demangled name to the kernel and what its code depends on.

    float16 and bfloat16 are the same but for the opcode.
    """
    name = re.sub(r"\(kvevict::\w+\)|\(anonymous namespace\)::|^void |kvevict::", "", name)
    name = re.sub(r"TileShape<(\d), (\d+), \w+> ?", r"\1, \2", name)
    name = re.sub(r"(logit_score_kernel)<\d>", r"\1", name)
    name = re.sub(r"_kernel<0(?=[,>])", "_kernel<float", name)
    name = re.sub(r"_kernel<[12](?=[,>])", "_kernel<half", name)
    name = re.sub(r"(column_kernel<\w+, \d+), \d", r"\1", name)  # whatever statistic
    name = re.sub(r"(move_rows_kernel<[\w ]+), \d+", r"\1", name)  # however many threads
    return name.replace(", false>", ">")


def parse_ptxas(log: str) -> dict[str, Resources]:
    """Return the resources of the kernels, by mangled name."""
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function '")[1:]:

        def number(pattern: str, text: str = part) -> int:
            return sum(int(n) for n in re.findall(pattern, text))

        found[part.split("'", 1)[0]] = Resources(
            registers=number(r"Used (\d+) registers"),
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill"),
            static_shared=number(r"(\d+) bytes smem"),
        )
    return found


def warnings_of(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r"warning|error", line, re.IGNORECASE)]


def disassemble(cubin: Path) -> dict[str, str]:
    """Return the SASS of the kernels, by mangled name; skip without a disassembler."""
    tool = find_tool("nvdisasm")
    if tool is None:
        pytest.skip(f"no nvdisasm: {MISSING}test-requirements.txt")
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
