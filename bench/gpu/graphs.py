"""Captures every op in a CUDA graph; the replay must give the bytes that the eager call gives.

python -m bench.gpu.graphs [--dry-run]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.gpu.sanitize import Arguments, calls
from bench.gpu.timer import CudaTimer, WallTimer, timer
from tests.support.checks import assert_same_bytes, clone, outcome


def assert_replays(clock: CudaTimer | WallTimer, op: Any, arguments: Arguments) -> None:
    """Captures on one copy of the inputs, replays twice on fresh contents at the same addresses."""
    expected = outcome(op, arguments)
    static = clone(arguments)
    op(**static)  # loads the kernels: that may not happen during the capture
    captured: list[Any] = []
    replay = clock.capture([lambda: captured.append(op(**static))])
    for attempt in range(2):
        for mine, pristine in zip(
            pytree.tree_leaves(static), pytree.tree_leaves(arguments), strict=True
        ):
            if isinstance(mine, Tensor):
                mine.copy_(pristine)
        for result in pytree.tree_leaves(captured):
            if isinstance(result, Tensor) and attempt == 1:
                result.zero_()
        replay()
        clock.synchronize()

        def given(**same: Any) -> Any:
            # `outcome` clears what lies behind the kept rows of the copy that it passes.
            for copy, mine in zip(
                pytree.tree_leaves(same), pytree.tree_leaves(static), strict=True
            ):
                if isinstance(copy, Tensor):
                    copy.copy_(mine)
            return captured[-1]

        assert_same_bytes(outcome(given, arguments), expected, f"replay {attempt + 1}")


def main() -> None:
    """Checks every sample of every op; exits with status 1 and the reasons if one fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.graphs", description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    clock = timer(options.dry_run)
    failures, number = [], 0
    for op, name, arguments in calls(clock.device, brief=options.dry_run):
        number += 1
        try:
            assert_replays(clock, getattr(torch.ops.kvevict, op), arguments)
        except Exception as error:
            failures.append(f"{op} ({name}): {type(error).__name__}: {str(error)[:300]}")
    print(f"{number} graphs, {len(failures)} failures", *failures[:20], sep="\n")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
