"""Calls every op on small inputs: shows that the library loads, and compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.gpu.sanitize [--device cuda] [--brief]

The inputs are made on the CPU, so that hardly any kernel but ours runs on the device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import kvevict
from tests.support.samples import NAMES, Sizes, make_sample

FLOATING = ("query", "key", "value", "keys", "values", "tokens", "tensors")
TILES = Sizes("cpu", 2, 2, 8, 2, 67, 331, 64, num_rows=37, k=101)
# head_dim 128 in bf16 is the kernels' usual case; one query row takes the decode paths.
USUAL = Sizes("cpu", 2, 1, 4, 1, 100, 700, 128, num_rows=100, k=140)
DECODE = Sizes("cpu", 2, 2, 4, 1, 1, 1300, 128, num_rows=1, k=200)
LONG_ROW = Sizes("cpu", batch_size=1, num_kv_heads=2, kv_len=100_000, k=20_000)

Arguments = dict[str, Any]


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments with queries and caches in `dtype`."""
    return {
        name: pytree.tree_map_only(Tensor, lambda t: t.to(dtype), value)
        if name in FLOATING
        else value
        for name, value in arguments.items()
    }


def calls(device: str, brief: bool) -> Iterator[tuple[str, str, Arguments]]:
    """Op, name of the call and its arguments on `device`; briefly only the smallest shapes."""
    variants: list[tuple[str, Sizes, torch.dtype]] = [("small fp32", Sizes(), torch.float32)]
    if not brief:
        variants += [
            ("tiles fp32", TILES, torch.float32),
            ("tiles fp16", TILES, torch.float16),
            ("usual bf16", USUAL, torch.bfloat16),
            ("decode bf16", DECODE, torch.bfloat16),
        ]
    torch.manual_seed(0)
    for variant, sizes, dtype in variants:
        for op, sample in NAMES:
            arguments = in_dtype(make_sample(op, sample, sizes), dtype)
            yield op, f"{sample}, {variant}", to_device(arguments, device)
    if not brief:
        for op in ("mix_scores", "select_topk"):
            for sample in ("full", "plain"):
                arguments = make_sample(op, sample, LONG_ROW)
                yield op, f"{sample}, long row", to_device(arguments, device)


def to_device(arguments: Arguments, device: str) -> Arguments:
    """The arguments on `device`."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments)


def main() -> None:
    """Calls every op; exits with status 1 and the reasons if one fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--brief", action="store_true")
    options = parser.parse_args()
    print(json.dumps(kvevict.build_info()))
    if options.device == "cuda" and not kvevict.build_info()["cuda_version"]:
        raise SystemExit("the library has no CUDA kernels")
    failures, number = [], 0
    for op, name, arguments in calls(options.device, options.brief):
        number += 1
        try:
            getattr(torch.ops.kvevict, op)(**arguments)
            if options.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            failures.append(f"{op} ({name}): {type(error).__name__}: {str(error)[:300]}")
    print(f"{number} calls, {len(failures)} failures", *failures[:20], sep="\n")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
