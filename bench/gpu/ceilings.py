"""What the GPU can do at most: `ceilings.cu`, compiled with nvcc at run time, and torch.

python -m bench.gpu.ceilings --out FILE.json [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Any

import torch

from bench.gpu.timer import CudaTimer, WallTimer, summarize, timer

SOURCE = Path(__file__).with_name("ceilings.cu")
REPEATS = 20


@dataclass(frozen=True)
class GpuCeilings:
    """FLOP/s and bytes/s of a GPU, in the place of bench.ceilings.Ceilings; None: not measured.

    copy_rate counts bytes read and written. Plain reads are held against it too: that is the goal.
    """

    bf16_flops: float
    copy_rate: float
    read_only_rate: float | None = None
    gather_256_rate: float | None = None
    mma_sync_flops: float | None = None
    ex2_rate: float | None = None

    def flops(self, dtype: torch.dtype) -> float:
        """The rate of a bf16 matrix product by torch; the cases are bf16."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"no ceiling for {dtype}")
        return self.bf16_flops

    @property
    def read_rate(self) -> float:
        """What stages that read are held against."""
        return self.copy_rate

    @property
    def nt_copy_rate(self) -> float:
        """What stages that move are held against."""
        return self.copy_rate

    def as_dict(self) -> dict[str, float | None]:
        """The fields, ready for JSON."""
        return asdict(self)


def describe(ceilings: Mapping[str, float | None]) -> str:
    """One line for people."""
    parts = [
        f"{text} {value / scale:.{digits}f} {unit}"
        for name, text, scale, unit, digits in (
            ("copy_rate", "copy", 1e12, "TB/s (read and written counted)", 2),
            ("read_only_rate", "read", 1e12, "TB/s", 2),
            ("gather_256_rate", "gather of random 256-byte rows", 1e12, "TB/s", 2),
            ("bf16_flops", "bf16 matmul", 1e12, "TFLOP/s", 0),
            ("mma_sync_flops", "mma.sync", 1e12, "TFLOP/s", 0),
            ("ex2_rate", "ex2", 1e12, "T/s", 2),
        )
        if (value := ceilings.get(name)) is not None
    ]
    return "ceilings: " + ", ".join(parts)


def from_torch(clock: CudaTimer | WallTimer, size: int, num_bytes: int) -> dict[str, float]:
    """Rates of a bf16 matrix product and of a copy."""

    def rate(work: float, call: Callable[[], Any]) -> float:
        clock.seconds([call] * 5)
        return work / summarize(clock.seconds([call] * REPEATS)).median

    a, b = (
        torch.randn(size, size, device=clock.device, dtype=torch.float32).bfloat16()
        for _ in range(2)
    )
    out = torch.empty_like(a)
    flops = rate(2.0 * size**3, lambda: torch.mm(a, b, out=out))
    source = torch.randn(num_bytes // 4, device=clock.device)
    target = torch.empty_like(source)
    return {"bf16_flops": flops, "copy_rate": rate(2.0 * num_bytes, lambda: target.copy_(source))}


def from_cuda(architecture: str, execute: bool) -> dict[str, float]:
    """Compiles `ceilings.cu` and runs it where asked."""
    nvcc = which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        options = ["-std=c++17", "-O3", f"-arch={architecture}", "-o", str(program)]
        subprocess.run([nvcc, *options, str(SOURCE)], check=True, timeout=60)
        if not execute:
            return {}
        run = subprocess.run([str(program)], check=True, timeout=60, stdout=subprocess.PIPE)
        rates: dict[str, float] = json.loads(run.stdout)
        return rates


def main() -> None:
    """Measures; in a dry run does the same on tiny tensors and writes no number."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ceilings", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    clock = timer(options.dry_run)
    torch.manual_seed(0)
    if options.dry_run:
        from_torch(clock, 32, 1 << 12)
        if which("nvcc"):
            from_cuda("sm_90", execute=False)
        options.out.write_text("null\n")
        return
    measured = from_torch(clock, 8192, 2 << 30)
    copies = {"torch_copy_rate": measured["copy_rate"]}
    # What torch gave is worth having, whatever becomes of the rest.
    options.out.write_text(json.dumps(measured) + "\n")
    torch.cuda.empty_cache()
    major, minor = torch.cuda.get_device_capability()
    rates = from_cuda(f"sm_{major}{minor}", execute=True)
    copies |= {name: rates.pop(name) for name in ("memcpy_rate", "kernel_copy_rate")}
    print(f"copies: {copies}")
    ceilings = GpuCeilings(
        bf16_flops=measured["bf16_flops"],
        copy_rate=max(copies.values()),
        read_only_rate=rates.pop("read_rate"),
        **rates,
    )
    print(describe(ceilings.as_dict()))
    options.out.write_text(json.dumps(ceilings.as_dict()) + "\n")


if __name__ == "__main__":
    main()
