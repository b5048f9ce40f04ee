"""Inputs and comparisons of the tests of matching and merging."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import Metric
from kvevict.reference.match_tokens import similarities
from tests.support.checks import Arguments, to_cpu
from tests.support.shapes import make_tensor
from tests.support.tolerances import RELATIVE


@dataclass(frozen=True)
class Tokens:
    """The sizes of tokens and lists; lists of one head serve all.

    layout: one of shapes.make_tensor, or "unaligned": rows start anywhere.
    """

    name: str
    batch_size: int = 2
    num_heads: int = 2
    num_tokens: int = 40
    dim: int = 64
    num_sources: int = 37
    num_targets: int = 29
    list_heads: int = 2
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype, device: str, dim: int | None = None) -> Tensor:
        """Return tokens of some other dim, if one is given."""
        dim = self.dim if dim is None else dim
        if self.layout == "unaligned":
            size = (self.batch_size, self.num_heads, self.num_tokens, dim + 1)
            return torch.randn(size).to(dtype).to(device)[..., 1:]
        return make_tensor(
            self.batch_size,
            self.num_heads,
            self.num_tokens,
            dim,
            dtype=dtype,
            device=device,
            layout=self.layout,
        )

    def make_list(self, length: int, device: str) -> Tensor:
        """Return positions in no order, with duplicates and -1."""
        size = (self.batch_size, self.list_heads, length)
        return torch.randint(-1, self.num_tokens, size, dtype=torch.int32).to(device)


SMALLEST = Tokens("smallest", 1, 1, 2, 8, 1, 1, 1)
ODD = Tokens("odd", 3, 3, 13, 24, 5, 7, 3)
# One over the tiles of any backend; several panels, blocks, splits.
ONE_OVER = Tokens("one_over", 1, 2, 80, 128, 129, 65)
SHARED = Tokens("shared_list", list_heads=1, dim=96)
MANY_TARGETS = Tokens("many_targets", 1, 1, 300, 16, 70, 1100, 1)
MANY_SOURCES = Tokens("many_sources", 1, 1, 300, 8, 600, 50, 1)
DIM_72 = Tokens("dim_72", dim=72)
DIM_136 = Tokens("dim_136", dim=136)
DIM_256 = Tokens("dim_256", 1, 1, 50, 256, 67, 70, 1)
DIM_1032 = Tokens("dim_1032", 1, 1, 30, 1032, 20, 70, 1)
TRANSPOSED = Tokens("transposed", layout="transposed")
SLICED = Tokens("sliced", layout="sliced", dim=80)
UNALIGNED = Tokens("unaligned", layout="unaligned", dim=40)
UNALIGNED_LONG = Tokens("unaligned_long", layout="unaligned", dim=152)
BATCH_0 = Tokens("batch_0", 0)
NO_HEADS = Tokens("no_heads", num_heads=0, list_heads=1)
NO_TOKENS = Tokens("no_tokens", num_tokens=0)
NO_SOURCES = Tokens("no_sources", num_sources=0)
NO_TARGETS = Tokens("no_targets", num_targets=0)

LAYOUTS = (TRANSPOSED, SLICED, UNALIGNED, UNALIGNED_LONG)
EMPTY = (BATCH_0, NO_HEADS, NO_TOKENS, NO_SOURCES, NO_TARGETS)
ALL = (
    *(SMALLEST, ODD, ONE_OVER, SHARED, MANY_TARGETS, MANY_SOURCES),
    *(DIM_72, DIM_136, DIM_256, DIM_1032, *LAYOUTS, *EMPTY),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_shape = pytest.mark.parametrize("shape", ALL, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matching_arguments(shape: Tokens, dtype: torch.dtype, device: str) -> Arguments:
    """Return tokens and lists without groups."""
    return {
        "tokens": shape.make(dtype, device),
        "source_index": shape.make_list(shape.num_sources, device),
        "target_index": shape.make_list(shape.num_targets, device),
    }


def assert_matches(actual: tuple[Tensor, Tensor], arguments: Arguments) -> None:
    """Compare with the oracle: equal but for targets that are as similar within the rounding.

    A similarity may be off by RELATIVE of the product of the norms.
    """
    match_index, similarity = to_cpu(actual)
    arguments = to_cpu(arguments)
    best, expected = reference.match_tokens(**arguments)
    assert (match_index.shape, match_index.dtype) == (best.shape, torch.int32)
    assert (similarity.shape, similarity.dtype) == (best.shape, torch.float32)
    exists = best >= 0
    assert torch.equal(match_index >= 0, exists)
    assert (similarity[~exists] == -torch.inf).all()
    if not exists.any():
        return

    tokens, source_index = arguments["tokens"], arguments["source_index"]
    target_index = arguments["target_index"].expand(*match_index.shape[:2], -1)
    metric = arguments.get("metric", Metric.COSINE)
    table = similarities(tokens, source_index, target_index, metric)
    chosen = (target_index[..., None, :] == match_index[..., None]) & exists[..., None]
    if "source_group" in arguments:
        groups = arguments["source_group"][..., None], arguments["target_group"][..., None, :]
        chosen = chosen & (groups[0] == groups[1])
    assert chosen.any(-1)[exists].all(), "a target that is none of the group"
    of_match = table.where(chosen, -torch.inf).amax(-1)
    bound = torch.full_like(expected, RELATIVE)
    if metric == Metric.DOT:
        norms = tokens.double().norm(dim=-1)
        bound = RELATIVE * norms.amax() ** 2 * torch.ones_like(expected)
    for value in (similarity.double(), of_match):
        assert ((value - expected).abs() <= bound)[exists].all()


def merging_arguments(
    shape: Tokens, dtype: torch.dtype, device: str, *, value_dim: int | None = None
) -> Arguments:
    """Return two tensors, and pairs of which half the tokens may be sources, half targets."""
    source_index, match_index = (
        shape.make_list(shape.num_sources, device) // 2 * 2 + kind for kind in (0, 1)
    )
    for positions in (source_index, match_index):
        positions[positions >= shape.num_tokens] = -1
        positions[positions < 0] = -1
    size = (shape.batch_size, shape.list_heads, shape.num_tokens)
    return {
        "tensors": [shape.make(dtype, device), shape.make(dtype, device, value_dim)],
        "source_index": source_index,
        "match_index": match_index,
        "weight": torch.rand(size, device=device),
    }


def assert_merges(actual: list[Tensor], arguments: Arguments) -> None:
    """Compare tensors that an op has merged with the oracle, which gets the arguments before.

    A target may be off by half a unit in its last place and RELATIVE of its summands; every other
    byte must be as it was.
    """
    before = to_cpu(arguments["tensors"])
    rest = to_cpu({name: value for name, value in arguments.items() if name != "tensors"})
    exact = [tensor.double() for tensor in before]
    reference.merge_tokens_(exact, **rest)
    summands = [tensor.double().abs() for tensor in before]
    absolute = {**rest, "weight": rest["weight"].abs()}
    reference.merge_tokens_(summands, **absolute)
    for mine, old, expected, sizes in zip(to_cpu(actual), before, exact, summands, strict=True):
        assert (mine.shape, mine.dtype) == (old.shape, old.dtype)
        untouched = (expected == old.double()).all(-1)
        assert torch.equal(mine[untouched], old[untouched])
        info = torch.finfo(mine.dtype)
        bound = info.eps / 2 * expected.abs() + RELATIVE * sizes.maximum(expected.abs())
        error = (mine.double() - expected).abs()
        assert (error <= bound + info.tiny)[~untouched].all(), float((error - bound).max())


def light_kv_example(device: str) -> tuple[Arguments, Tensor]:
    """Return the tokens and lists of a window of LightKV worked out by hand, and the weights.

    Tokens 1 to 8 are the vision tokens of one window; every second of them may be merged, half of
    those will.
    """
    rows = [(1, 1), (1, 0), (2, 1), (0, 1), (1, 2), (3, 1), (0, 2), (-1, 1), (2, 2), (5, -1)]
    tokens = torch.zeros(1, 1, 10, 8, device=device)
    tokens[..., :2] = torch.tensor(rows, dtype=torch.float32)
    guidance = torch.tensor([2, 3, 3, 2, 4, 4, 2, 3, 3, 2], device=device).view(1, 1, 10) / 14
    lists = torch.tensor([[[1, 3, 5, 7]], [[2, 4, 6, 8]]], dtype=torch.int32, device=device)
    arguments = {"tokens": tokens, "source_index": lists[:1], "target_index": lists[1:]}
    return arguments, guidance


def assert_light_kv_merge(tokens: Tensor) -> None:
    """Compare merged tokens with what the example says."""
    expected, _ = light_kv_example("cpu")
    expected["tokens"][0, 0, 2, :2] = torch.tensor([18 / 7, 1])
    expected["tokens"][0, 0, 6, :2] = torch.tensor([0, 1.5])
    torch.testing.assert_close(tokens.cpu(), expected["tokens"])
