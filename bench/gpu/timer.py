"""Seconds of calls: CUDA events and graph replay on a GPU, the wall clock in a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bench.report import Timing

Call = Callable[[], object]


class CudaTimer:
    """Times on the device; calls are enqueued one behind the other without waiting."""

    device = "cuda"

    def seconds(self, calls: Sequence[Call], between: Callable[[int], None] | None = None):
        """Seconds of each call; `between` is enqueued before each, outside of the clock."""
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in calls
        ]
        for index, (call, (start, end)) in enumerate(zip(calls, events, strict=True)):
            if between is not None:
                between(index)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def capture(self, calls: Sequence[Call]) -> Call:
        """A CUDA graph of all calls, ready to replay; what they allocate is the graph's."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def synchronize(self) -> None:
        """Waits for the device; raises what went wrong there."""
        torch.cuda.synchronize()

    def peak_bytes(self, call: Call) -> int:
        """Most memory in use during a call above what was before, its results included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def cache_bytes(self) -> int:
        """Size of the L2 cache."""
        return torch.cuda.get_device_properties(0).L2_cache_size


class WallTimer:
    """The same on the CPU, to rehearse; its seconds go into no report."""

    device = "cpu"

    def seconds(self, calls: Sequence[Call], between: Callable[[int], None] | None = None):
        """Seconds of each call."""
        result = []
        for index, call in enumerate(calls):
            if between is not None:
                between(index)
            start = time.perf_counter()
            call()
            result.append(time.perf_counter() - start)
        return result

    def capture(self, calls: Sequence[Call]) -> Call:
        """All calls one after the other."""
        return lambda: [call() for call in calls]

    def synchronize(self) -> None:
        """Nothing runs behind our back."""

    def peak_bytes(self, call: Call) -> int:
        """Unknown: 0."""
        call()
        return 0

    def cache_bytes(self) -> int:
        """Small, so that few input sets are made."""
        return 1 << 16


def timer(dry_run: bool) -> CudaTimer | WallTimer:
    """The timer of this run."""
    return WallTimer() if dry_run else CudaTimer()


def summarize(seconds: Sequence[float]) -> Timing:
    """Median, interquartile range over the median, and the medians of both halves of the run."""
    ordered, half = sorted(seconds), len(seconds) // 2
    quartiles = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.75))
    low, high = quartiles
    middle = median(ordered)
    return Timing(
        median=middle,
        spread=(high - low) / middle,
        halves=(median(seconds[:half] or seconds), median(seconds[half:])),
        num_samples=len(seconds),
        noisy=False,
    )
