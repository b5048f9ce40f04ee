"""Comparisons that the tests of all ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree

from kvevict import reference
from kvevict.reference.broadcast_indices import expand_lists
from kvevict.reference.evict_slots import expand_slots
from tests.support.backends import Backend
from tests.support.tolerances import assert_scores_close, in_input_precision

Arguments = dict[str, Any]


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor on the CPU, one row."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def as_integers(tensor: Tensor) -> Tensor:
    """Return a view of a tensor of any dtype as integers of the same size."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def assert_same_bytes(actual: Any, expected: Any, hint: str = "") -> None:
    """Assert that two trees of tensors agree in structure, shape, dtype and every byte."""
    actual_leaves, expected_leaves = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual_leaves) == len(expected_leaves), hint
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        assert type(a) is type(e), hint
        if not isinstance(e, Tensor):
            assert repr(a) == repr(e), hint  # NaN is itself here
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype), hint
        different = (bytes_of(a) != bytes_of(e)).nonzero()
        assert different.numel() == 0, f"{hint}: {len(different)} bytes differ"


def clone(tree: Any) -> Any:
    """Return a deep copy of a tree of tensors. Strides are kept, overlaps are not."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.clone(memory_format=torch.preserve_format), tree
    )


def to_cpu(tree: Any) -> Any:
    """Return a copy of a tree of tensors on the CPU."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), tree)


def assert_matches_oracle(
    backend: Backend, op: str, arguments: Arguments, *, extreme: bool = False, terms: float = 0.0
) -> Any:
    """Call an op that writes no argument, compare with its oracle, return what it returned."""
    actual = backend.op(op)(**arguments)
    oracle, on_cpu = getattr(reference, op), to_cpu(arguments)
    expected = pytree.tree_leaves(oracle(**on_cpu))
    plain = [None] * len(expected)
    if extreme:
        plain = pytree.tree_leaves(in_input_precision(oracle, **on_cpu))
    for a, e, p in zip(pytree.tree_leaves(actual), expected, plain, strict=True):
        assert_scores_close(a, e, p, terms=terms)
    return actual


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run with that many threads of torch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(function: Callable[..., Any], arguments: Arguments) -> tuple[Any, list[Tensor]]:
    """Call on a copy of the arguments; return the results and the tensors that were written.

    What lies behind the live rows of a cache is unspecified: here it is 0.
    """
    arguments = clone(arguments)
    result = function(**arguments)
    if "tensors" in arguments:
        return result, arguments["tensors"]
    if "budget" in arguments:
        caches = [arguments["key"], arguments["value"]]
    elif result is not None:
        return result, []
    elif "keys" in arguments and "values" in arguments:
        caches = [*arguments["keys"], *arguments["values"]]
    else:
        return result, [arguments["scores"]] if "scores" in arguments else arguments["keys"]
    sizes = len(caches) // 2, caches[0].shape[1]
    if "slots" in arguments:
        slots, lens = expand_slots(arguments["slots"], arguments["kv_lens"], *sizes)
        lens = lens - (slots >= 0).sum(-1)
    elif "budget" in arguments:
        _, lens = expand_lists(*result[:2], *sizes)
    else:
        _, lens = expand_lists(arguments["kept_indices"], arguments.get("kept_lens"), *sizes)
    for cache, cache_lens in zip(caches, [*lens, *lens], strict=True):
        index = torch.arange(cache.shape[2], device=cache.device)
        as_integers(cache).masked_fill_((index >= cache_lens[..., None])[..., None], 0)
    return result, caches


def batch_dim(argument: str, tensor: Tensor) -> int:
    """Return which dimension of an argument is the batch: lists may have the layers before it.

    Positions by sequence have no axes in front here.
    """
    behind = {"kept_indices": 3, "kept_lens": 2, "base_indices": 3, "block_tables": 2}
    behind |= {"slots": 3, "kv_lens": 2, "old_positions": 3, "new_positions": 3}
    return max(tensor.dim() - behind[argument], 0) if argument in behind else 0


def take_sequence(arguments: Arguments, b: int) -> Arguments:
    """Return the arguments of a batch that is only sequence b."""

    def take(argument: str, value: Any) -> Any:
        if isinstance(value, list):
            return [take(argument, tensor) for tensor in value]
        if not isinstance(value, Tensor) or argument in ("inv_freq", "axis_of_freq"):
            return value
        return value.narrow(batch_dim(argument, value), b, 1)

    return {argument: take(argument, value) for argument, value in arguments.items()}


def spread(tensor: Tensor) -> Tensor:
    """Return the same values with a stride of 2 in the last dimension."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def assert_fake_matches(backend: Backend, op: str, arguments: Arguments) -> None:
    """Assert that the fake kernel predicts shape, stride, dtype and device of every result."""
    with FakeTensorMode() as mode:
        fake_arguments = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        fake = pytree.tree_leaves(backend.op(op)(**fake_arguments))
    real = pytree.tree_leaves(backend.op(op)(**arguments))
    assert len(fake) == len(real)
    for f, r in zip(fake, real, strict=True):
        if r is not None:
            assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)
            assert f.device == r.device


def assert_compiles(backend: Backend, op: str, cases: list[Arguments], compiler: str) -> None:
    """Assert that one compiled graph serves all cases, whatever their sizes, as the op does."""
    function = backend.op(op)

    def call(**arguments: Any) -> Any:
        return function(**arguments)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for number, arguments in enumerate(cases):
        with (
            torch._dynamo.config.patch(error_on_recompile=number > 0),
            fx_config.patch(use_duck_shape=False),  # equal sizes of one case may differ in the next
        ):
            assert_same_bytes(outcome(compiled, arguments), outcome(function, arguments))
