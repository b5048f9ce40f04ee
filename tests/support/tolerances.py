"""How close is close enough. The one place that says so.

Indices and moved bytes are exact. Scores have two rules, both against the float64 oracle, which
gets the same inputs:

- each element within 1e-5 of its value, for every dtype, since ops accumulate in float32;
- for extreme inputs (logits so large that their own rounding decides), no error larger than twice
  the largest error of the same computation in plain torch in the precision of the inputs.

Both allow one float32 rounding of the largest value on top, since scores are float32. Where terms
cancel, as in a cosine, 8 roundings of what their magnitudes add up to are allowed as well.

Keys that are rotated in place lie within half a unit in the last place of their dtype and 1e-6 of
the largest element of their row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

RELATIVE = 1e-5
PLAIN_FACTOR = 2.0
RELATIVE_OF_ROTATED = 1e-6
ROUNDINGS_OF_TERMS = 8


def in_input_precision(oracle: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run an oracle in the dtype of its inputs: plain torch, without the step to float64."""
    with mock.patch.object(torch.Tensor, "double", lambda tensor: tensor):
        return oracle(*args, **kwargs)


def assert_scores_close(
    actual: Tensor, expected: Tensor, plain: Tensor | None = None, *, terms: float = 0.0
) -> None:
    """Compare float32 scores with those of the oracle.

    Args:
        actual: what the op returned, float32.
        expected: what the oracle returned, float64.
        plain: what the oracle returned in the precision of the inputs; None for the first rule.
        terms: the most that the magnitudes of an element's terms add up to, if some may cancel.
    """
    assert actual.dtype == torch.float32 and expected.dtype == torch.float64
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual = actual.detach().cpu().double()
    finite = expected.isfinite()
    torch.testing.assert_close(
        actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True, msg="infinity or NaN"
    )
    actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0:
        return

    eps = torch.finfo(torch.float32).eps
    rounding = eps * (expected.abs().max() + ROUNDINGS_OF_TERMS * terms)
    if plain is None:
        bound = RELATIVE * expected.abs() + rounding
    else:
        plain_error = (plain.double()[finite] - expected).abs().nan_to_num(torch.inf, torch.inf)
        bound = PLAIN_FACTOR * plain_error.max().expand_as(expected) + rounding
    error = (actual - expected).abs()
    excess = (error / bound.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(torch.inf)
    worst = int(excess.argmax())
    assert excess[worst] <= 1, (
        f"{float(actual[worst])} is {float(error[worst]):.3g} away from {float(expected[worst])}, "
        f"{float(bound[worst]):.3g} is allowed"
    )


def assert_rotated_close(actual: Tensor, expected: Tensor) -> None:
    """Compare rotated keys [..., head_dim] of any dtype with those of the oracle, in float64."""
    assert actual.shape == expected.shape and expected.dtype == torch.float64
    info = torch.finfo(actual.dtype)
    actual = actual.detach().cpu().double()
    rounding = (expected.abs() * info.eps).clamp(min=info.tiny * info.eps) / 2
    bound = rounding + RELATIVE_OF_ROTATED * expected.abs().amax(-1, keepdim=True)
    excess = ((actual - expected).abs() / bound).nan_to_num(torch.inf).flatten()
    if excess.numel() == 0:
        return
    worst = int(excess.argmax())
    assert excess[worst] <= 1, (
        f"{float(actual.flatten()[worst])}, not {float(expected.flatten()[worst])}: "
        f"{float(excess[worst]):.3g} times what is allowed"
    )
