"""key_diversity against its oracle, and what cosines must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support import shapes
from tests.support.backends import Backend
from tests.support.checks import Arguments, assert_matches_oracle, assert_same_bytes, num_threads
from tests.support.scoring import attention_arguments, every_padded_shape, shapes_and_dtypes
from tests.support.shapes import Shape

OP = "key_diversity"
SEVERAL_HEADS = Shape("several_heads", 3, 2, 2, 1, 600, 24, hole_every=7)
COSINES = 1.0  # the most that the terms of a cosine add up to


def key_arguments(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Arguments:
    """Return the key and key_mask of a shape; keys have a common part, as those of models have."""
    arguments = attention_arguments(shape, device, dtype)
    return {"key": arguments["key"] + 0.5, "key_mask": arguments["key_mask"]}


def compute(backend: Backend, key: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    similarity, redundancy = backend.op(OP)(key, key_mask=key_mask)
    return similarity, redundancy


@pytest.mark.every_isa
@shapes_and_dtypes
def test_matches_oracle(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    arguments = key_arguments(shape, backend.device, dtype)
    similarity, redundancy = assert_matches_oracle(backend, OP, arguments, terms=COSINES)
    assert (
        similarity.shape == arguments["key"].shape[:3] and redundancy.shape == similarity.shape[:2]
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(backend: Backend, head_dim: int) -> None:
    shape = Shape("any", 1, 2, 2, 1, 19, head_dim, hole_every=5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = key_arguments(shape, backend.device, dtype)
        assert_matches_oracle(backend, OP, arguments, terms=COSINES)


@pytest.mark.parametrize("width", [45, 48])
def test_layout_does_not_matter(backend: Backend, width: int) -> None:
    """Rows that do not start on 16 bytes are read in another way."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = shapes.make_tensor(2, 3, 140, width, dtype=dtype, device=backend.device)
        odd = wide[..., 3:43]
        assert_same_bytes(compute(backend, odd), compute(backend, odd.contiguous()))


@every_padded_shape
def test_padding_may_hold_anything(backend: Backend, shape: Shape) -> None:
    arguments = key_arguments(shape, backend.device)
    key, key_mask = arguments["key"], arguments["key_mask"]
    expected = compute(backend, key, key_mask)
    spoiled = key.masked_fill(~key_mask[:, None, :, None], torch.nan)
    spoiled[..., ::2].masked_fill_(~key_mask[:, None, :, None], torch.inf)
    assert_same_bytes(compute(backend, spoiled, key_mask), expected)
    assert not expected[0].masked_fill(key_mask[:, None], 0).any()


@pytest.mark.parametrize("shape", [shapes.VERY_LONG, SEVERAL_HEADS], ids=str)
def test_threads_that_share_heads(backend: Backend, shape: Shape) -> None:
    """Whole heads per thread or parts of them: the same sums."""
    arguments = key_arguments(shape, backend.device)
    expected = compute(backend, **arguments)
    for count in (2, 5, 16):
        with num_threads(count):
            assert_same_bytes(compute(backend, **arguments), expected, f"{count} threads")


def test_known_cosines(backend: Backend) -> None:
    axes = torch.eye(8, device=backend.device)
    cases = {
        "equal": (axes[:1].expand(6, -1), 1.0, 1.0),
        "orthogonal": (axes, 1 / 8, 0.0),
        "opposite": (torch.cat([axes[:1], -axes[:1]]), 0.0, 0.0),  # the mean cosine is -1
    }
    for name, (keys, similarity, redundancy) in cases.items():
        actual = compute(backend, keys[None, None] * 3.0)
        expected = torch.full_like(actual[0], similarity), torch.full_like(actual[1], redundancy)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-7, msg=name)


@pytest.mark.every_isa
@pytest.mark.parametrize("exponent", [-28, 56])
def test_lengths_do_not_matter(backend: Backend, exponent: int) -> None:
    key = key_arguments(shapes.GROUP_4, backend.device)["key"]
    assert_same_bytes(compute(backend, key * 2.0**exponent), compute(backend, key))


@pytest.mark.every_isa
def test_short_keys_count_less(backend: Backend) -> None:
    """A norm below 1e-12 is taken for 1e-12, and a zero vector is similar to nothing."""
    key = key_arguments(shapes.GROUP_4, backend.device)["key"]
    key[:, :, 3:9] *= 1e-13
    key[:, :, 9:12] *= 1e-30
    key[:, :, 20:30] = 0.0
    similarity, _ = assert_matches_oracle(backend, OP, {"key": key}, terms=COSINES)
    assert not similarity[:, :, 20:30].any()


@pytest.mark.parametrize("num_real", [0, 1, 2])
def test_few_keys(backend: Backend, num_real: int) -> None:
    key = key_arguments(shapes.ODD, backend.device)["key"]
    key_mask = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    key_mask[:, 4 : 4 + num_real] = True
    arguments = {"key": key, "key_mask": key_mask}
    similarity, redundancy = assert_matches_oracle(backend, OP, arguments, terms=COSINES)
    assert bool(redundancy.any()) == (num_real == 2)
    if num_real == 1:
        torch.testing.assert_close(similarity[:, :, 4], torch.ones_like(similarity[:, :, 4]))


@pytest.mark.every_isa
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2e19, 3e38])
def test_a_key_without_a_norm_spoils_its_head(backend: Backend, value: float) -> None:
    arguments = key_arguments(shapes.HOLES, backend.device)
    expected = compute(backend, **arguments)
    arguments["key"][1, 0, 4, 7] = value
    similarity, redundancy = compute(backend, **arguments)
    real = arguments["key_mask"][1]
    assert similarity[1, 0, real].isnan().all() and redundancy[1, 0].isnan()
    assert not similarity[1, 0, ~real].any()
    similarity[1, 0], redundancy[1, 0] = expected[0][1, 0], expected[1][1, 0]
    assert_same_bytes((similarity, redundancy), expected)


def test_the_largest_norm_that_counts(backend: Backend) -> None:
    key = key_arguments(shapes.ODD, backend.device)["key"]
    key[0, 0, 5] *= 1.7e19 / key[0, 0, 5].norm()
    assert_matches_oracle(backend, OP, {"key": key}, terms=COSINES)
