"""What the machine can do at most, measured in the same run as the operators.

`ceilings.cpp` is compiled with the system's g++ for the host and kept in a cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
COMPILE = ["g++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]

READ, COPY, NT_COPY = range(3)


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes/s (read and written together) of the machine, with `num_threads` threads."""

    num_threads: int
    fp32_flops: float
    bf16_flops: float
    has_bf16_dot: bool
    read_rate: float
    copy_rate: float
    nt_copy_rate: float

    def flops(self, dtype: torch.dtype) -> float:
        """The peak for inputs of `dtype`, products summed in fp32."""
        return self.bf16_flops if dtype == torch.bfloat16 else self.fp32_flops

    def at_best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, field by field."""
        mine, theirs = asdict(self), asdict(other)
        return Ceilings(**{name: max(mine[name], theirs[name]) for name in mine})

    def as_dict(self) -> dict[str, float]:
        """The fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        bf16 = (
            f"{self.bf16_flops / 1e9:.0f} GFLOP/s (vdpbf16ps)"
            if self.has_bf16_dot
            else "no AVX-512-BF16, the fp32 peak stands in"
        )
        return (
            f"ceilings with {self.num_threads} threads: "
            f"fp32 FMA {self.fp32_flops / 1e9:.0f} GFLOP/s, bf16 {bf16}; "
            f"DRAM read {self.read_rate / 1e9:.1f}, copy {self.copy_rate / 1e9:.1f}, "
            f"non-temporal copy {self.nt_copy_rate / 1e9:.1f} GB/s (read and written counted)"
        )


def measure(num_threads: int | None = None) -> Ceilings:
    """Measures every ceiling, best of several tries; takes a quarter of a second."""
    library = _library()
    threads = num_threads or torch.get_num_threads()
    fp32 = library.fma_flops(threads, 2_000_000, 5)
    bf16 = library.bf16_dot_flops(threads, 2_000_000, 5)
    num_bytes = max(256 << 20, 4 * last_level_cache_bytes())

    def memory(kind: int) -> float:
        return library.memory_rate(kind, threads, num_bytes, 5)

    return Ceilings(
        num_threads=threads,
        fp32_flops=fp32,
        bf16_flops=bf16 or fp32,
        has_bf16_dot=bf16 > 0,
        read_rate=memory(READ),
        copy_rate=memory(COPY),
        nt_copy_rate=memory(NT_COPY),
    )


def last_level_cache_bytes() -> int:
    """Size of the largest cache of core 0, 32 MiB where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)


def cpu_name() -> str:
    """The processor as the system names it, with family and model, which tell generations apart."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def compile_shared(source: Path, *options: str) -> Path:
    """Compiles a C++ file for this host into the cache folder, once; returns the library."""
    command = [*COMPILE, *options]
    key = hashlib.sha256("\0".join([source.read_text(), *command, cpu_name()]).encode()).hexdigest()
    cache_root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    library = Path(cache_root) / "kvevict-bench" / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            subprocess.run([*command, str(source), "-o", str(built)], check=True)
            built.replace(library)
    return library


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_shared(SOURCE)))
    for name in ("fma_flops", "bf16_dot_flops"):
        getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    library.memory_rate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    for name in ("fma_flops", "bf16_dot_flops", "memory_rate"):
        getattr(library, name).restype = ctypes.c_double
    return library


if __name__ == "__main__":
    print(measure())
