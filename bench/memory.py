"""Peak extra memory of every contender, in a process of its own.

`memory.cpp` is preloaded there and counts every byte of the C heap, which is where torch's CPU
allocator, MKL, oneDNN and native kernels get their memory from, on any thread. A contender runs
once to warm up, then once counted: the peak above what was in use before is its extra memory. It
includes what the contender returns.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.ceilings import compile_shared
from bench.harness import Case, run_once

SOURCE = Path(__file__).with_name("memory.cpp")
ROOT = Path(__file__).parents[1]

PeakBytes = dict[str, dict[str, int]]


def measure(cases: Iterable[tuple[str, Case]]) -> PeakBytes:
    """Measures cases given as (module, case); returns bytes by case and contender."""
    wanted: Mapping[str, list[str]] = defaultdict(list)
    for module, case in cases:
        wanted[module].append(str(case))
    peaks: PeakBytes = json.loads(run_counted("-m", "bench.memory", json.dumps(wanted)))
    return peaks


def run_counted(*arguments: str) -> str:
    """Output of a Python process whose heap is counted."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env=dict(os.environ, LD_PRELOAD=str(compile_shared(SOURCE))),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return result.stdout


def counted_heap() -> ctypes.CDLL:
    """The counters of this process, which `run_counted` has started."""
    heap = ctypes.CDLL(None)
    for function in (heap.counted_in_use, heap.counted_peak):
        function.restype = ctypes.c_int64
    return heap


def peak_extra_bytes(heap: ctypes.CDLL, run: Callable[[Any], Any], inputs: Any) -> int:
    """Peak bytes that one call of `run` adds to the heap."""
    before = heap.counted_in_use()
    heap.counted_reset_peak()
    result = run(inputs)
    peak: int = heap.counted_peak() - before
    del result
    return peak


def main(arguments: list[str]) -> None:
    """Measures the cases named in the first argument and prints the bytes as JSON."""
    heap = counted_heap()
    gc.disable()  # what a call leaves in cycles is its own memory, not a gift to the next
    peaks: PeakBytes = {}
    for module, names in json.loads(arguments[0]).items():
        for case in importlib.import_module(module).CASES:
            if str(case) not in names:
                continue
            inputs = case.make_inputs()
            run_once(case, inputs)
            peaks[str(case)] = {
                name: peak_extra_bytes(heap, run, inputs) for name, run in case.contenders.items()
            }
            del inputs
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1:])
