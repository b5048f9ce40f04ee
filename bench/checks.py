"""Correctness before speed: what every contender must give before it is timed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bench.report import OURS

# Relative L2 error against float64. Ours sums in fp32 whatever the inputs are; eager torch rounds
# the attention matrix to the dtype of the inputs. Tensor cores keep fewer bits while they add up.
TOLERANCE_OF_OURS = {"cpu": 1e-5, "cuda": 1e-4}
TOLERANCE_OF_PEERS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of `expected`, in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def check_close(contender: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Holds a contender's scores against the oracle; `dtype` is that of the inputs."""
    assert actual.shape == expected.shape, f"{contender}: {actual.shape}, not {expected.shape}"
    limit = (
        TOLERANCE_OF_OURS[actual.device.type] if contender == OURS else TOLERANCE_OF_PEERS[dtype]
    )
    error = relative_error(actual, expected)
    assert error <= limit, f"{contender}: relative error {error:.2e} exceeds {limit:.0e}"


def check_rounded(contender: str, actual: Tensor, expected: Tensor) -> None:
    """Holds a contender's keys against the oracle's in float64: ours are rounded once."""
    assert actual.shape == expected.shape, f"{contender}: {actual.shape}, not {expected.shape}"
    half_unit = torch.finfo(actual.dtype).eps / 2
    limit = half_unit if contender == OURS else TOLERANCE_OF_PEERS[actual.dtype]
    error = relative_error(actual, expected)
    assert error <= limit, f"{contender}: relative error {error:.2e} exceeds {limit:.0e}"


def check_equal(contender: str, actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Demands equal values, list by list."""
    for index, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(mine, wanted), f"{contender}: result {index} differs"


def check_same_choice(
    contender: str, actual: Tensor, expected: Tensor, kv_len: int, share: float
) -> None:
    """Demands that two choices [batch_size, num_heads, k] agree in `share` of their keys."""

    def chosen(index: Tensor) -> Tensor:
        empty = torch.zeros(*index.shape[:2], kv_len, dtype=torch.bool)
        return empty.scatter_(2, index.long(), True)

    common = (chosen(actual) & chosen(expected)).sum() / expected.numel()
    assert common >= share, f"{contender}: only {float(common):.1%} of the kept keys are right"
