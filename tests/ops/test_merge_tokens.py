"""merge_tokens_: targets within the rounding of the oracle, every other byte as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from tests.support import merging
from tests.support.backends import Backend
from tests.support.checks import Arguments, as_integers, assert_same_bytes, clone, to_cpu
from tests.support.merging import (
    Tokens,
    assert_light_kv_merge,
    assert_merges,
    every_dtype,
    every_shape,
    light_kv_example,
    merging_arguments,
)

OP = "merge_tokens_"


def merged(backend: Backend, arguments: Arguments) -> list[Tensor]:
    """Return what the op makes of copies of the tensors, which keep their strides."""
    arguments = {**arguments, "tensors": copies(arguments["tensors"])}
    assert backend.op(OP)(**arguments) is None
    return arguments["tensors"]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies at the same place of larger buffers."""
    results = []
    for tensor in tensors:
        storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        storage = storage.set_(tensor.untyped_storage().clone())
        results.append(storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    return results


def assert_right(backend: Backend, arguments: Arguments) -> None:
    assert_merges(merged(backend, arguments), arguments)


def pairs(backend: Backend, *of_token: tuple[int, int]) -> Arguments:
    """Return lists of one sequence and head that merge (source, target) pairs."""
    lists = torch.tensor(of_token, dtype=torch.int32, device=backend.device).view(-1, 2)
    return {"source_index": lists[None, None, :, 0], "match_index": lists[None, None, :, 1]}


def column(backend: Backend, *values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return tokens [1, 1, len(values), 8], each of one value."""
    tokens = torch.tensor(values, device=backend.device).to(dtype).view(1, 1, -1, 1)
    return tokens.repeat(1, 1, 1, 8)


def ones(backend: Backend, num_tokens: int) -> Tensor:
    return torch.ones(1, 1, num_tokens, device=backend.device)


@pytest.mark.every_isa
@every_dtype
@every_shape
def test_matches_oracle(backend: Backend, shape: Tokens, dtype: torch.dtype) -> None:
    arguments = merging_arguments(shape, dtype, backend.device, value_dim=shape.dim + 16)
    assert_right(backend, arguments)
    assert_right(backend, {**arguments, "normalize": False})


@pytest.mark.every_isa
@pytest.mark.parametrize("shared", ["source_index", "match_index", "weight"])
def test_a_list_or_weight_for_all_heads(backend: Backend, shared: str) -> None:
    shape = Tokens("shared", 2, 3, 40, 16, 30, 0, 3)
    arguments = merging_arguments(shape, torch.float32, backend.device)
    arguments[shared] = arguments[shared][:, :1]
    assert_right(backend, arguments)


@pytest.mark.every_isa
def test_dtypes_may_differ(backend: Backend) -> None:
    shape = Tokens("mixed")
    arguments = merging_arguments(shape, torch.float32, backend.device)
    arguments["tensors"] = [
        shape.make(dtype, backend.device, dim)
        for dtype, dim in zip(merging.DTYPES * 2, (8, 24, 64, 72, 136, 520), strict=True)
    ]
    assert_right(backend, arguments)


@pytest.mark.every_isa
@every_dtype
def test_signed_weights(backend: Backend, dtype: torch.dtype) -> None:
    arguments = merging_arguments(Tokens("signed"), dtype, backend.device)
    arguments["weight"] = arguments["weight"] - 0.5
    assert_right(backend, {**arguments, "normalize": False})


@pytest.mark.every_isa
@pytest.mark.parametrize("num_sources", [1, 2, 33, 700])
def test_many_sources_of_one_target(backend: Backend, num_sources: int) -> None:
    tokens = torch.randn(1, 2, num_sources + 1, 136, device=backend.device)
    sources = 1 + torch.randperm(num_sources, device=backend.device)
    arguments = {
        "tensors": [tokens],
        "source_index": sources.int().expand(1, 1, -1),
        "match_index": torch.zeros_like(sources).int().expand(1, 1, -1),
        "weight": torch.rand(1, 2, num_sources + 1, device=backend.device),
    }
    assert_right(backend, arguments)


@pytest.mark.every_isa
def test_sources_are_added_in_the_order_of_the_list(backend: Backend) -> None:
    """In float32 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1: the target is 1e8 here."""
    for order, expected in (((1, 2), 0.0), ((2, 1), 1.0)):
        tokens = column(backend, 1e8, 1.0, -1e8)
        lists = pairs(backend, *((source, 0) for source in order))
        backend.op(OP)([tokens], **lists, weight=ones(backend, 3), normalize=False)
        assert (tokens[0, 0, 0] == expected).all()


@pytest.mark.every_isa
@every_dtype
def test_integers_are_exact(backend: Backend, dtype: torch.dtype) -> None:
    arguments = merging_arguments(merging.ODD, dtype, backend.device)
    for tensor in arguments["tensors"]:
        tensor.copy_(torch.randint(-3, 4, tensor.shape))
    arguments["weight"] = (arguments["weight"] * 5).floor()
    arguments["normalize"] = False
    expected = to_cpu(arguments)
    reference.merge_tokens_(**expected)
    assert_same_bytes(merged(backend, arguments), expected["tensors"])


@pytest.mark.every_isa
@every_dtype
def test_results_are_rounded_once_and_to_even(backend: Backend, dtype: torch.dtype) -> None:
    """The mean of neighbors lies in the middle; the neighbor with an even last bit is right."""
    bits = torch.randint(0x3C00, 0x4400, (50,))
    low = bits.to({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    low = (low << 16 | 0x1234) if dtype == torch.float32 else low
    tokens = torch.stack([low, low + 1]).view(dtype).view(1, 1, 100, 1).repeat(1, 1, 1, 8)
    tokens = tokens.to(backend.device)
    lists = pairs(backend, *((i + 50, i) for i in range(50)))
    backend.op(OP)([tokens], **lists, weight=ones(backend, 100))
    expected = torch.where(low % 2 == 0, low, low + 1)
    assert torch.equal(as_integers(tokens)[0, 0, :50, 3].cpu(), expected)


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, -2.0, 1.0), (-1.0, 0.0, 0.0)])
def test_without_weight_it_is_the_mean(backend: Backend, weights: tuple[float, ...]) -> None:
    tokens = column(backend, 1.0, 2.0, 6.0, 9.0)
    weight = torch.tensor([[[*weights, 0.0]]], device=backend.device)
    backend.op(OP)([tokens], **pairs(backend, (1, 0), (2, 0)), weight=weight)
    assert tokens[0, 0, :, 0].tolist() == [3.0, 2.0, 6.0, 9.0]


def test_a_source_may_be_merged_twice(backend: Backend) -> None:
    """Into one target or two: it is only read."""
    tokens = column(backend, 0.0, 3.0, 6.0)
    weight = ones(backend, 3)
    backend.op(OP)([tokens], **pairs(backend, (1, 0), (1, 0), (1, 2)), weight=weight)
    assert tokens[0, 0, :, 0].tolist() == [2.0, 3.0, 4.5]


def test_a_target_may_be_an_unmerged_source(backend: Backend) -> None:
    tokens = column(backend, 1.0, 2.0, 3.0)
    lists = pairs(backend, (1, 0), (0, -1), (-1, 2))
    backend.op(OP)([tokens], **lists, weight=ones(backend, 3))
    assert tokens[0, 0, :, 0].tolist() == [1.5, 2.0, 3.0]


def test_heads_have_their_own_roles(backend: Backend) -> None:
    """What is a source in one head may be a target in another."""
    tokens = column(backend, 1.0, 2.0, 4.0).repeat(1, 2, 1, 1)
    match_index = torch.tensor([[[1, -1], [-1, 0]]], dtype=torch.int32, device=backend.device)
    sources = torch.tensor([[[0, 1]]], dtype=torch.int32, device=backend.device)
    backend.op(OP)([tokens], sources, match_index, ones(backend, 3))
    assert tokens[0, :, :, 0].tolist() == [[1.0, 1.5, 4.0], [1.5, 2.0, 4.0]]


def test_nothing_to_merge(backend: Backend) -> None:
    arguments = merging_arguments(merging.ODD, torch.float16, backend.device)
    for name in ("source_index", "match_index"):
        nothing = {**arguments, name: torch.full_like(arguments[name], -1)}
        assert_same_bytes(merged(backend, nothing), arguments["tensors"])


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
@every_dtype
def test_writes_only_targets(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """The bytes around the targets stay as they were, also those of NaN."""
    shape = Tokens("slice", layout=layout, dim=24)
    arguments = merging_arguments(shape, dtype, backend.device)
    tensor = arguments["tensors"][0]
    whole = torch.empty(0, dtype=dtype, device=backend.device).set_(tensor.untyped_storage())
    is_target = torch.zeros(tensor.shape[:3], dtype=torch.bool)
    both = (arguments["source_index"] >= 0) & (arguments["match_index"] >= 0)
    for b, h, place in both.nonzero().tolist():
        is_target[b, h, arguments["match_index"][b, h, place]] = True
    assert is_target.any() and not is_target.all()
    before = clone(whole)
    backend.op(OP)(**arguments)
    after = clone(whole)
    as_integers(whole).fill_(0)
    as_integers(tensor).masked_fill_(is_target.to(backend.device)[..., None], 1)
    outside = as_integers(whole) == 0
    assert_same_bytes(after[outside], before[outside])


@pytest.mark.parametrize("num_tokens", [255, 256, 300, 65_600])
def test_positions_of_several_digits(backend: Backend, num_tokens: int) -> None:
    """Targets anywhere among many tokens."""
    positions = torch.randperm(num_tokens - 1)[:200].int()
    positions[0] = num_tokens - 1
    arguments = {
        "tensors": [torch.randn(1, 1, num_tokens, 8, device=backend.device)],
        "source_index": positions[None, None, 40:].to(backend.device),
        "match_index": positions[None, None, :40].repeat(1, 1, 4).to(backend.device),
        "weight": torch.rand(1, 1, num_tokens, device=backend.device),
    }
    assert_right(backend, arguments)


def test_more_tensors_than_a_launch_takes(backend: Backend) -> None:
    shape = Tokens("tiny", 1, 1, 4, 8, 2, 0, 1)
    arguments = merging_arguments(shape, torch.float32, backend.device)
    arguments |= pairs(backend, (0, 1), (2, 3))
    arguments["tensors"] = [shape.make(torch.float32, backend.device) for _ in range(70)]
    assert_right(backend, arguments)


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Tokens of one head 2**31 bytes apart; only the pages in use are ever touched."""
    whole = torch.empty(2**31 + 16, dtype=torch.float16, device=backend.device)
    tokens = whole.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1))
    tokens.copy_(column(backend, 1.0, 2.0, 4.0).repeat(1, 1, 1, 2))
    backend.op(OP)([tokens], **pairs(backend, (0, 2)), weight=ones(backend, 3))
    assert tokens[0, 0, :, 5].tolist() == [1.0, 2.0, 2.5]


def test_a_lazy_clone_gets_memory_of_its_own(backend: Backend) -> None:
    original = torch.randn(1, 1, 4, 8, device=backend.device)
    before = original.clone()
    tokens = torch._lazy_clone(original)
    backend.op(OP)([tokens], **pairs(backend, (0, 1)), weight=ones(backend, 4))
    assert torch.equal(original, before)
    assert not torch.equal(tokens, before)


@pytest.mark.parametrize("argument", ["source_index", "match_index", "weight"])
def test_lists_must_not_lie_in_the_tensors(backend: Backend, argument: str) -> None:
    tokens = torch.zeros(1, 1, 4, 8, device=backend.device)
    before = tokens.clone()
    inside = tokens.view(1, 1, 32)[:, :, 4:8]
    arguments = {
        "source_index": torch.ones(1, 1, 4, dtype=torch.int32, device=backend.device),
        "match_index": torch.full((1, 1, 4), -1, dtype=torch.int32, device=backend.device),
        "weight": ones(backend, 4),
    }
    arguments[argument] = inside if argument == "weight" else inside.view(torch.int32)
    with pytest.raises(ValueError, match=rf"{argument} must not overlap tensors\[0\]"):
        backend.op(OP)([tokens], **arguments)
    assert torch.equal(tokens, before)


@pytest.mark.every_isa
def test_light_kv(backend: Backend) -> None:
    """The window worked out by hand, from matching to merging."""
    lists, guidance = light_kv_example(backend.device)
    match_index, similarity = backend.op("match_tokens")(**lists)
    kept, _ = backend.op("select_topk")(similarity, 2)
    chosen = torch.full_like(match_index, -1).scatter(
        2, kept.long(), match_index.gather(2, kept.long())
    )
    tokens = lists["tokens"]
    backend.op(OP)([tokens], lists["source_index"], chosen, guidance)
    assert_light_kv_merge(tokens)
