"""csrc/core/order.h: the total order of scores."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

SPECIALS = np.array(
    [
        *(0x00000000, 0x80000000),  # zeros
        *(0x7F800000, 0xFF800000),  # infinities
        *(0x7F7FFFFF, 0xFF7FFFFF),  # largest magnitudes
        *(0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF),  # subnormals
        *(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),  # NaNs
    ],
    dtype=np.uint32,
).view(np.float32)
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def bit_patterns() -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    return np.concatenate([bits.view(np.float32), SPECIALS])


def rank(scores: np.ndarray) -> np.ndarray:
    """Return the place of each score in the total order; equal scores share it."""
    nan = np.isnan(scores)
    pairs = np.stack([~nan, np.where(nan, np.float32(0), scores)], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)


@pytest.mark.parametrize(
    "scores", [HALVES, SPECIALS, bit_patterns()], ids=["half", "special", "bits"]
)
def test_keys_are_in_the_order_of_the_scores(host: ModuleType, scores: np.ndarray) -> None:
    keys, ranks = host.order_key(scores), rank(scores)
    order = np.argsort(ranks, kind="stable")
    steps, rises = np.diff(keys[order].astype(np.int64)), np.diff(ranks[order])
    assert np.array_equal(steps > 0, rises > 0)
    assert (steps >= 0).all()


def test_every_nan_has_one_key_below_infinity_and_zeros_are_equal(host: ModuleType) -> None:
    keys = host.order_key(SPECIALS)
    assert len(set(keys[np.isnan(SPECIALS)])) == 1
    assert keys[np.isnan(SPECIALS)][0] < host.order_key(np.float32([-np.inf]))[0]
    assert keys[0] == keys[1]


def test_two_keys_stay_free(host: ModuleType) -> None:
    keys = host.order_key(np.concatenate([HALVES, bit_patterns()]))
    assert keys.min() > host.KEY_NEVER and keys.max() < host.KEY_ALWAYS
