"""Sizes that are known only when a graph runs, as `.item()` gives them, in export and compile."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.support.backends import OPS, Backend, written_arguments
from tests.support.checks import assert_same_bytes, outcome
from tests.support.samples import Arguments, Sizes, make_sample

KV_LEN, K = 11, 5  # no other size equals them
TAKE_LISTS = ("broadcast_indices", "gather_kv", "compact_kv_")
SCORE = ("attention_lse", "score_keys", "score_keys_by_text", "select_topk", "score_and_compact")


def sizes_of(op: str) -> list[str]:
    """Return the arguments of an op that are sizes."""
    return re.findall(r"SymInt (\w+)", str(getattr(torch.ops.kvevict, op).default._schema))


def cut(arguments: Arguments, size: int, to: Any) -> Arguments:
    """Return the arguments with every dimension of a size cut to another; lists stay valid."""

    def cut_tensor(tensor: Tensor) -> Tensor:
        for dim, length in enumerate(tensor.shape):
            if length == size:
                tensor = tensor.narrow(dim, 0, to)
        return tensor

    lens = {name: arguments[name].clamp(max=to) for name in ("kept_lens",) if name in arguments}
    return pytree.tree_map_only(Tensor, cut_tensor, arguments) | lens


class Call(torch.nn.Module):
    """Calls an op with arguments made within the graph."""

    def __init__(self, op: Callable[..., Any], prepare: Callable[[Arguments], Arguments]) -> None:
        super().__init__()
        self.op, self.prepare = op, prepare

    def forward(self, arguments: Arguments) -> Any:
        return self.op(**self.prepare(arguments))


def assert_traceable(
    backend: Backend, op: str, arguments: Arguments, prepare: Callable[[Arguments], Arguments]
) -> None:
    """Assert that exported and compiled calls do what the call does."""
    call = Call(backend.op(op), prepare)
    exported = torch.export.export(call, (arguments,)).module()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = outcome(lambda **a: call(a), arguments)
    for function in (exported, compiled):
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            actual = outcome(lambda f=function, **a: f(a), arguments)
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("op", [op for op in OPS if sizes_of(op)])
def test_arguments(traceable_backend: Backend, op: str) -> None:
    arguments = make_sample(op, "full", Sizes(traceable_backend.device))
    sizes = sizes_of(op)
    arguments |= {name: torch.tensor(arguments[name]) for name in sizes}
    assert_traceable(
        traceable_backend,
        op,
        arguments,
        lambda given: given | {name: given[name].item() for name in sizes},
    )


@pytest.mark.parametrize(
    ("op", "size"), [(op, K) for op in TAKE_LISTS] + [(op, KV_LEN) for op in SCORE]
)
def test_lengths(traceable_backend: Backend, op: str, size: int) -> None:
    """Caches cut to a number of tokens, or lists to a number of entries, that data decide."""
    sizes = Sizes(traceable_backend.device, kv_len=KV_LEN, k=K)
    arguments = make_sample(op, "full", sizes) | {"length": torch.tensor(size - 1)}

    # torch cannot yet trace writing to a view of a size that it does not know.
    written = written_arguments(op) if size == KV_LEN else ()

    def prepare(given: Arguments) -> Arguments:
        arguments = dict(given)
        arguments = cut(arguments, size, arguments.pop("length").item())
        return arguments | {name: arguments[name].clone() for name in written}

    assert_traceable(traceable_backend, op, arguments, prepare)
