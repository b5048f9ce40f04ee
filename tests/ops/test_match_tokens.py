"""match_tokens: the same choice as the oracle, but for what rounding can tell apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import Metric
from tests.support import merging
from tests.support.backends import Backend
from tests.support.checks import Arguments, assert_same_bytes, to_cpu
from tests.support.merging import (
    Tokens,
    assert_matches,
    every_dtype,
    every_shape,
    light_kv_example,
    matching_arguments,
)

OP = "match_tokens"
every_metric = pytest.mark.parametrize("metric", Metric)


def assert_right(backend: Backend, arguments: Arguments) -> None:
    assert_matches(backend.op(OP)(**arguments), arguments)


def assert_exact(backend: Backend, arguments: Arguments) -> None:
    """Compare bytes, where float32 computes without an error."""
    match_index, similarity = reference.match_tokens(**to_cpu(arguments))
    assert_same_bytes(backend.op(OP)(**arguments), (match_index, similarity.float()))


def groups_of_sizes(sizes: list[int], lists: Tensor) -> Tensor:
    """Return groups 0, 1, ... of so many neighboring places; the rest is of the last one."""
    ends = torch.tensor(sizes).cumsum(0)
    place = torch.arange(lists.shape[-1])
    groups = torch.searchsorted(ends, place, right=True).int()
    return groups.expand(lists.shape).to(lists.device)


@pytest.mark.every_isa
@every_dtype
@every_shape
def test_matches_oracle(backend: Backend, shape: Tokens, dtype: torch.dtype) -> None:
    arguments = matching_arguments(shape, dtype, backend.device)
    for metric in Metric:
        assert_right(backend, {**arguments, "metric": metric})


GROUPS = {
    "one_each": ([1] * 10, [1] * 10),
    "windows": ([18, 17, 18, 17, 18], [18, 18, 17, 18, 17]),
    "one_large": ([3, 60, 5], [2, 70, 6]),
    "no_sources": ([0, 20, 0, 20], [10, 10, 10, 10]),
    "no_targets": ([10, 10, 10, 30], [0, 40, 0, 0]),
    "nothing_in_common": ([0, 30, 0, 30, 0, 40], [30, 0, 30, 0, 40]),
}


@pytest.mark.every_isa
@pytest.mark.parametrize("dim", [64, 200])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups(backend: Backend, groups: str, dim: int) -> None:
    shape = Tokens("grouped", 2, 2, 120, dim, 100, 90)
    arguments = matching_arguments(shape, torch.float32, backend.device)
    for name, sizes in zip(("source", "target"), GROUPS[groups], strict=True):
        arguments[f"{name}_group"] = groups_of_sizes(sizes, arguments[f"{name}_index"])
    assert_right(backend, arguments)


def test_groups_that_skip_numbers(backend: Backend) -> None:
    arguments = matching_arguments(merging.SHARED, torch.float32, backend.device)
    sources, targets = (arguments[f"{name}_index"] for name in ("source", "target"))
    expected = backend.op(OP)(
        **arguments,
        source_group=groups_of_sizes([9, 9], sources),
        target_group=groups_of_sizes([9, 9], targets),
    )
    largest = 2**31 - 1
    actual = backend.op(OP)(
        **arguments,
        source_group=groups_of_sizes([9, 9], sources) * (largest // 2),
        target_group=groups_of_sizes([9, 9], targets) * (largest // 2),
    )
    assert_same_bytes(actual, expected)


def test_none_has_no_group(backend: Backend) -> None:
    """Where there is no token its group may be anything."""
    arguments = matching_arguments(merging.SHARED, torch.float32, backend.device)
    for name in ("source", "target"):
        groups = groups_of_sizes([11, 9], arguments[f"{name}_index"]).clone()
        arguments[f"{name}_group"] = groups
    expected = backend.op(OP)(**arguments)
    for name in ("source", "target"):
        arguments[f"{name}_group"][arguments[f"{name}_index"] < 0] = -7
    assert_same_bytes(backend.op(OP)(**arguments), expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("dim", [8, 200])
def test_small_tokens_are_less_similar(backend: Backend, dim: int) -> None:
    """Where norms are below 1e-3, the 1e-8 in the denominator counts; it differs by list."""
    shape = Tokens("small", 2, 3, 40, dim, 20, 19, 3)
    arguments = matching_arguments(shape, torch.float32, backend.device)
    scale = torch.logspace(-5, -4, 6, device=backend.device).view(2, 3, 1, 1)
    arguments["tokens"] = arguments["tokens"] * scale
    _, similarity = backend.op(OP)(**arguments)
    assert 0 < similarity[0, 0].max() < 0.8 * similarity[1, 2].max()
    assert_right(backend, arguments)


@pytest.mark.every_isa
@every_dtype
@pytest.mark.parametrize("dim", [8, 128, 520])
def test_ties_go_to_the_first(backend: Backend, dim: int, dtype: torch.dtype) -> None:
    """Products of small integers are exact and often equal."""
    shape = Tokens("ties", 1, 2, 150, dim, 130, 200)
    arguments = matching_arguments(shape, dtype, backend.device)
    small = torch.randint(-1, 2, arguments["tokens"].shape, device=backend.device)
    small[..., 8:] = 0
    arguments |= {"tokens": small.to(dtype), "metric": Metric.DOT}
    assert_exact(backend, arguments)


@pytest.mark.every_isa
@every_metric
def test_equal_tokens_are_as_similar(backend: Backend, metric: int) -> None:
    """A copy of a target further behind never wins, wherever the two stand in the tiles."""
    half = torch.randn(1, 1, 100, 64)
    tokens = torch.cat([half, half, torch.randn(1, 1, 50, 64)], dim=2)
    first = torch.randperm(100)
    second = torch.randperm(100) + 100
    targets = torch.cat([first, second]).int()
    arguments = {
        "tokens": tokens.to(backend.device),
        "source_index": torch.arange(200, 250, device=backend.device).int().view(1, 1, -1),
        "target_index": targets.to(backend.device).view(1, 1, -1),
        "metric": metric,
    }
    match_index, _ = backend.op(OP)(**arguments)
    assert (match_index < 100).all()
    arguments["target_index"] = arguments["target_index"].flip(-1)
    match_index, _ = backend.op(OP)(**arguments)
    assert (match_index >= 100).all()


SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0]


@pytest.mark.every_isa
@every_dtype
def test_special_values(backend: Backend, dtype: torch.dtype) -> None:
    """A token is 0 but for its first element, so that a product is that of two special values."""
    tokens = torch.zeros(1, 1, 60, 8)
    tokens[0, 0, :, 0] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (60,))]
    tokens[0, 0, :3, 0] = torch.tensor([1.0, -1.0, 0.0])
    sources = torch.arange(3).int().repeat(12).view(12, 1, 3)
    targets = torch.randint(3, 60, (12, 1, 4)).int()
    targets[0] = targets[0, 0, 0]
    arguments = {
        "tokens": tokens.expand(12, 1, 60, 8).to(dtype).to(backend.device),
        "source_index": sources.to(backend.device),
        "target_index": targets.to(backend.device),
        "metric": Metric.DOT,
    }
    assert_exact(backend, arguments)


@pytest.mark.every_isa
@every_dtype
def test_infinite_tokens_have_no_direction(backend: Backend, dtype: torch.dtype) -> None:
    """Their cosines are NaN, and lose."""
    tokens = torch.randn(1, 1, 40, 16)
    tokens[0, 0, ::3, 5] = torch.inf
    sources, targets = torch.arange(10).int(), torch.arange(12, 40).int()
    arguments = {
        "tokens": tokens.to(dtype).to(backend.device),
        "source_index": sources.view(1, 1, -1).to(backend.device),
        "target_index": targets.view(1, 1, -1).to(backend.device),
    }
    match_index, similarity = to_cpu(backend.op(OP)(**arguments))
    infinite = sources % 3 == 0
    assert (match_index[0, 0][infinite] == 12).all()
    assert torch.equal(similarity.isnan()[0, 0], infinite)
    assert (match_index[0, 0][~infinite] % 3 != 0).all()
    arguments["source_index"] = arguments["source_index"][..., ~infinite]
    assert_right(backend, arguments)


@every_metric
@pytest.mark.parametrize("size", [1e12, 1e25])
def test_tokens_too_large_for_products(backend: Backend, metric: int, size: float) -> None:
    """Whatever is chosen, it is one of the targets."""
    arguments = matching_arguments(merging.ODD, torch.float32, backend.device)
    targets = arguments["target_index"] = arguments["target_index"].clamp(min=0)
    arguments["tokens"] *= size
    match_index, _ = backend.op(OP)(**arguments, metric=metric)
    is_target = (match_index[..., None] == targets[..., None, :]).any(-1)
    assert torch.equal(is_target, arguments["source_index"] >= 0)


def test_only_nan(backend: Backend) -> None:
    """The first target matches with NaN where there is nothing else; one number is enough."""
    tokens = torch.full((1, 1, 100, 16), torch.nan)
    tokens[0, 0, 0] = 1.0
    sources = torch.zeros(1, 1, 1, dtype=torch.int32)
    targets = torch.arange(1, 100, dtype=torch.int32).view(1, 1, -1)
    for metric in Metric:
        arguments = (tokens.to(backend.device), sources.to(backend.device))
        match_index, similarity = backend.op(OP)(
            *arguments, targets.to(backend.device), metric=metric
        )
        assert match_index.item() == 1 and similarity.isnan().all()
    tokens[0, 0, 77] = -1.0
    arguments = (tokens.to(backend.device), sources.to(backend.device))
    match_index, similarity = backend.op(OP)(*arguments, targets.to(backend.device))
    assert match_index.item() == 77
    assert similarity.item() == pytest.approx(-1.0)


@every_dtype
def test_zero_tokens(backend: Backend, dtype: torch.dtype) -> None:
    """Without a direction all cosines are 0, and the first target wins."""
    tokens = torch.zeros(1, 1, 9, 8, dtype=dtype, device=backend.device)
    lists = torch.arange(9, device=backend.device).int().view(1, 1, 9)
    match_index, similarity = backend.op(OP)(tokens, lists, lists.flip(-1))
    assert (match_index == 8).all() and (similarity == 0).all()


@pytest.mark.every_isa
def test_small_norms_count(backend: Backend) -> None:
    """The 1e-8 takes from the cosine of short tokens, but not from their rank."""
    tokens = torch.zeros(1, 1, 3, 8)
    tokens[0, 0, :, 0] = torch.tensor([1e-4, 2e-4, 1.0])
    tokens[0, 0, 2, 1] = 0.5
    lists = torch.tensor([[[0]], [[2]], [[1]]], dtype=torch.int32, device=backend.device)
    arguments = {"tokens": tokens.to(backend.device), "source_index": lists[:1]}
    _, similarity = backend.op(OP)(**arguments, target_index=lists[1:2])
    assert similarity.item() == pytest.approx(1 / 1.25**0.5, rel=1e-3)
    both = torch.cat([lists[1:2], lists[2:]], dim=-1)
    match_index, similarity = backend.op(OP)(**arguments, target_index=both)
    assert match_index.item() == 1
    assert similarity.item() == pytest.approx(2 / 3, rel=1e-5)


@pytest.mark.every_isa
def test_a_token_is_most_similar_to_itself(backend: Backend) -> None:
    tokens = torch.randn(1, 2, 90, 128, device=backend.device)
    lists = torch.stack([torch.randperm(90), torch.randperm(90)]).int().to(backend.device)[None]
    match_index, similarity = backend.op(OP)(tokens, lists, lists.flip(-1))
    assert torch.equal(match_index, lists)
    assert (similarity - 1).abs().max() < 1e-5


def test_all_lists_padded(backend: Backend) -> None:
    shape = merging.ODD
    arguments = matching_arguments(shape, torch.float32, backend.device)
    for name in ("source_index", "target_index"):
        padded = {**arguments, name: torch.full_like(arguments[name], -1)}
        match_index, similarity = backend.op(OP)(**padded)
        assert (match_index == -1).all() and (similarity == -torch.inf).all()


def test_padding_is_never_read(backend: Backend) -> None:
    """Tokens that no list names may be NaN."""
    arguments = matching_arguments(merging.SHARED, torch.float32, backend.device)
    arguments["source_index"] = arguments["source_index"] // 2
    arguments["target_index"] = arguments["target_index"] // 2
    expected = backend.op(OP)(**arguments)
    arguments["tokens"][:, :, 20:] = torch.nan
    assert_same_bytes(backend.op(OP)(**arguments), expected)


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Tokens of one head 2**31 bytes apart; only the pages in use are ever touched."""
    whole = torch.empty(2**31 + 32, dtype=torch.float16, device=backend.device)
    tokens = whole.as_strided((1, 1, 3, 32), (0, 0, 2**30, 1))
    tokens.copy_(torch.randn(1, 1, 3, 32))
    lists = torch.tensor([[[0, 1, 2]]], dtype=torch.int32, device=backend.device)
    match_index, _ = backend.op(OP)(tokens, lists, lists)
    assert torch.equal(match_index, lists)


@every_dtype
def test_light_kv(backend: Backend, dtype: torch.dtype) -> None:
    """The window worked out by hand: 3 goes best with 6, then 5 with 2."""
    arguments, _ = light_kv_example(backend.device)
    arguments["tokens"] = arguments["tokens"].to(dtype)
    match_index, similarity = backend.op(OP)(**arguments)
    assert match_index.flatten().tolist() == [2, 6, 2, 6]
    assert similarity.flatten().tolist() == pytest.approx([0.89443, 1, 0.98995, 0.70711], abs=1e-5)
