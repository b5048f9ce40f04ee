"""What every op must do, on the samples of tests/support/samples.py."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kvevict import ops, reference
from tests.support.backends import OPS, WRITING, Backend, written_arguments
from tests.support.checks import (
    assert_compiles,
    assert_fake_matches,
    assert_same_bytes,
    batch_dim,
    clone,
    num_threads,
    outcome,
    spread,
    take_sequence,
)
from tests.support.samples import NAMES, SAMPLES, Sizes, make_sample

every_op = pytest.mark.parametrize("op", OPS)
every_sample = pytest.mark.parametrize(("op", "sample"), NAMES)


def larger(device: str) -> Sizes:
    """Return sizes that take several tiles, blocks and threads, and are prime where they can be."""
    return Sizes(device, 3, 3, 8, 2, 67, 331, 64, num_rows=37, k=101)


def test_samples_cover_the_ops() -> None:
    enums = {"DiversityReference", "HeadReduction", "Metric", "Statistic"}
    assert set(SAMPLES) == set(OPS) == set(reference.__all__) == set(ops.__all__) - enums


@every_op
def test_signature(op: str) -> None:
    """The public function, the oracle and the schema agree in names, order, kinds and defaults."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        signature = inspect.signature(function)
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(getattr(ops, op)) == parameters(getattr(reference, op))
    schema = getattr(torch.ops.kvevict, op).default._schema
    kinds = {False: inspect.Parameter.POSITIONAL_OR_KEYWORD, True: inspect.Parameter.KEYWORD_ONLY}
    in_schema = [
        (a.name, kinds[a.kwarg_only], a.default_value if a.has_default_value() else inspect._empty)
        for a in schema.arguments
    ]
    assert in_schema == parameters(getattr(reference, op))


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree of arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@every_sample
def test_public_function_is_the_op(op: str, sample: str) -> None:
    arguments = make_sample(op, sample)
    actual = outcome(getattr(ops, op), arguments)
    assert_same_bytes(actual, outcome(getattr(torch.ops.kvevict, op), arguments))


@every_sample
def test_opcheck(traceable_backend: Backend, op: str, sample: str) -> None:
    arguments = make_sample(op, sample, Sizes(traceable_backend.device))
    torch.library.opcheck(traceable_backend.op(op).default, (), arguments)


@every_sample
def test_fake_kernel(traceable_backend: Backend, op: str, sample: str) -> None:
    assert_fake_matches(
        traceable_backend, op, make_sample(op, sample, larger(traceable_backend.device))
    )


@every_sample
def test_compile(traceable_backend: Backend, op: str, sample: str) -> None:
    small = make_sample(op, sample, Sizes(traceable_backend.device, qo_len=5))
    large = make_sample(
        op, sample, Sizes(traceable_backend.device, 2, 3, 6, 3, 6, 9, 24, num_rows=4, k=4)
    )
    assert_compiles(traceable_backend, op, [small, large], "aot_eager")


@pytest.mark.parametrize("op", WRITING)
def test_compile_with_inductor(traceable_backend: Backend, op: str) -> None:
    arguments = make_sample(op, "full", Sizes(traceable_backend.device))
    assert_compiles(traceable_backend, op, [arguments], "inductor")


@every_sample
def test_deterministic(backend: Backend, op: str, sample: str) -> None:
    """The same bytes from run to run and for any number of threads, also more than sequences."""
    sizes = larger(backend.device)
    for arguments in (
        make_sample(op, sample, sizes),
        make_sample(op, sample, replace(sizes, batch_size=1, num_kv_heads=1)),
    ):
        expected = outcome(backend.op(op), arguments)
        for count in (1, 2, 2, 5):
            with num_threads(count):
                actual = outcome(backend.op(op), arguments)
            assert_same_bytes(actual, expected, f"{count} threads")


@pytest.mark.parametrize(("op", "sample"), [name for name in NAMES if name[0] != "null"])
def test_each_sequence_stands_alone(backend: Backend, op: str, sample: str) -> None:
    """A sequence gets the same bytes in any batch."""
    sizes = larger(backend.device)
    arguments = make_sample(op, sample, sizes)
    result_dim = "kept_indices" if op == "broadcast_indices" else "scores"
    whole = outcome(backend.op(op), arguments)
    for b in range(sizes.batch_size):

        def take(tensor: Tensor, b: int = b) -> Tensor:
            return tensor.narrow(batch_dim(result_dim, tensor), b, 1)

        expected = pytree.tree_map_only(Tensor, take, whole)
        actual = outcome(backend.op(op), take_sequence(arguments, b))
        assert_same_bytes(actual, expected, f"sequence {b}")


@every_sample
def test_inputs_are_not_written(backend: Backend, op: str, sample: str) -> None:
    arguments = make_sample(op, sample, Sizes(backend.device))
    before = clone(arguments)
    backend.op(op)(**arguments)
    for name in set(arguments) - set(written_arguments(op)):
        assert_same_bytes(arguments[name], before[name], name)


def last_written(op: str, arguments: dict[str, Any]) -> Tensor:
    """Return one of the tensors that a call writes."""
    written = arguments[written_arguments(op)[-1]]
    return written[-1] if isinstance(written, list) else written


def with_last_written(op: str, arguments: dict[str, Any], tensor: Tensor) -> dict[str, Any]:
    """Return a call that writes that tensor instead of `last_written`."""
    name = written_arguments(op)[-1]
    written = arguments[name]
    changed = [*written[:-1], tensor] if isinstance(written, list) else tensor
    return {**arguments, name: changed}


@pytest.mark.parametrize("op", WRITING)
def test_writing_is_known_to_autograd(backend: Backend, op: str) -> None:
    """A backward through what was saved of a cache fails if the cache was written meanwhile."""
    arguments = make_sample(op, "full", Sizes(backend.device))

    def versions() -> dict[str, list[int]]:
        return {name: [t._version for t in tensors_of(value)] for name, value in arguments.items()}

    before = versions()
    weight = torch.ones((), device=backend.device, requires_grad=True)
    loss = (weight * last_written(op, arguments)).sum()
    backend.op(op)(**arguments)
    for name, after in versions().items():
        raised = int(name in written_arguments(op))
        assert after == [version + raised for version in before[name]], name
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", WRITING)
def test_what_requires_grad_is_not_written(backend: Backend, op: str) -> None:
    arguments = make_sample(op, "full", Sizes(backend.device))
    leaf = last_written(op, arguments).clone().requires_grad_()
    cases = {
        "a leaf Variable that requires grad is being used in an in-place operation": leaf,
        "in-place operation that has no derivative": leaf * 1,
        "in-place operation that has no derivative.": leaf[:],
    }
    for words, tensor in cases.items():
        call = with_last_written(op, arguments, tensor)
        before = clone(call)
        with pytest.raises(RuntimeError, match=f"kvevict::{op}: .*{words}"):
            backend.op(op)(**call)
        assert_same_bytes(call, before)
    with torch.no_grad():
        backend.op(op)(**with_last_written(op, arguments, leaf))
    assert leaf._version == 1


@pytest.mark.parametrize("op", WRITING)
def test_inference_tensors(backend: Backend, op: str) -> None:
    """As elsewhere in torch, they can be written only in inference mode."""
    arguments = make_sample(op, "full", Sizes(backend.device))
    with torch.inference_mode():
        call = with_last_written(op, arguments, last_written(op, arguments).clone())
        backend.op(op)(**call)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
        backend.op(op)(**call)


@every_op
def test_small_arguments_may_have_any_strides(backend: Backend, op: str) -> None:
    """Masks, weights, lists and the like need not be contiguous; query, key and value must be.

    So must be what is written.
    """
    arguments = make_sample(op, "full" if op != "null" else "plain", Sizes(backend.device))
    expected = outcome(backend.op(op), arguments)
    large = ("query", "key", "value", "keys", "values", "tokens", *written_arguments(op))
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in large:
            actual = outcome(backend.op(op), {**arguments, name: spread(value)})
            assert_same_bytes(actual, expected, name)
