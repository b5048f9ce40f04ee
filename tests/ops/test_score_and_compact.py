"""score_and_compact equals, bit for bit, the composition of the ops it is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvevict import reference
from kvevict.ops.enums import HeadReduction
from kvevict.reference.score_and_compact import mask_priority, pool_scores
from tests.support import shapes
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, clone, outcome, to_cpu
from tests.support.samples import NAMES, Arguments, Sizes, make_sample
from tests.support.shapes import Shape, make_rows
from tests.support.tolerances import assert_scores_close

OP = "score_and_compact"
SAMPLES = [sample for op, sample in NAMES if op == OP]


def compose(backend: Backend, arguments: Arguments) -> Any:
    """Do with the single ops, in place, what score_and_compact does."""
    rest = dict(arguments)
    query, key, value, budget = (rest.pop(name) for name in ("query", "key", "value", "budget"))
    priority, pool_kernel = rest.pop("priority", None), rest.pop("pool_kernel", 1)
    if rest.pop("text_weighted", False):
        rest.pop("head_reduction", None)
        scores, _, _ = backend.op("score_keys_by_text")(query, key, **rest)
    else:
        scores = backend.op("score_keys")(query, key, **rest)
    classes = mask_priority(scores, priority, rest.get("key_mask"))
    pooled = pool_scores(scores, classes, pool_kernel)
    kept_indices, kept_lens = backend.op("select_topk")(pooled, budget, priority=classes)
    backend.op("compact_kv_")([key], [value], kept_indices, kept_lens)
    return kept_indices, kept_lens, scores


def assert_composition(backend: Backend, arguments: Arguments) -> Any:
    def composed(**copied: Any) -> Any:
        return compose(backend, copied)

    actual = outcome(backend.op(OP), arguments)
    assert_same_bytes(actual, outcome(composed, arguments))
    return actual


def make_arguments(
    shape: Shape, device: str, dtype: torch.dtype = torch.float32, budget: int = 9
) -> Arguments:
    inputs = shapes.make_attention(shape, dtype, device)
    return {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        "key_mask": inputs.key_mask,
        "budget": budget,
    }


@pytest.mark.every_isa
@pytest.mark.parametrize("sample", SAMPLES)
def test_samples(backend: Backend, sample: str) -> None:
    assert_composition(backend, make_sample(OP, sample, Sizes(backend.device)))
    larger = Sizes(backend.device, 1, 3, 8, 2, 40, 150, 64, num_rows=20, k=50)
    assert_composition(backend, make_sample(OP, sample, larger))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_shapes(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    assert_composition(backend, make_arguments(shape, backend.device, dtype))


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [shapes.GROUP_8, shapes.LEFT_PADDED, shapes.LONG], ids=str)
def test_matches_oracle(backend: Backend, shape: Shape) -> None:
    """The scores are close; the choice is exact for the scores that were returned."""
    arguments = make_arguments(shape, backend.device, budget=40) | {"pool_kernel": 5}
    expected = to_cpu(arguments)
    _, _, expected_scores = reference.score_and_compact(**expected)
    kept_indices, kept_lens, scores = to_cpu(backend.op(OP)(**arguments))
    assert_scores_close(scores, expected_scores)
    classes = mask_priority(scores, None, expected["key_mask"])
    chosen = reference.select_topk(pool_scores(scores, classes, 5), 40, priority=classes)
    assert_same_bytes((kept_indices, kept_lens), chosen)


@pytest.mark.parametrize("pool_kernel", [1, 3, 5, 7, 63, 401])
def test_pool(backend: Backend, pool_kernel: int) -> None:
    shape = Shape("window", 2, 4, 2, 8, 200, 32)
    arguments = make_arguments(shape, backend.device, budget=60) | {"pool_kernel": pool_kernel}
    assert_composition(backend, arguments)
    priority = torch.randint(0, 4, (2, 200), dtype=torch.uint8, device=backend.device)
    assert_composition(backend, {**arguments, "priority": priority})


def test_pool_returns_the_raw_scores(backend: Backend) -> None:
    arguments = make_arguments(shapes.LONG, backend.device, budget=40)
    (_, _, raw), _ = outcome(backend.op(OP), arguments)
    (_, _, scores), _ = outcome(backend.op(OP), {**arguments, "pool_kernel": 7})
    assert_same_bytes(scores, raw)


@pytest.mark.parametrize("budget", [0, 1, 20, 21, 40])
@pytest.mark.parametrize("shape", [shapes.SLICED, shapes.ALL_PADDED], ids=str)
def test_budgets(backend: Backend, shape: Shape, budget: int) -> None:
    arguments = make_arguments(shape, backend.device, budget=budget)
    (kept_indices, kept_lens, _), _ = assert_composition(backend, arguments)
    assert kept_indices.shape == (2, 2, budget)
    real = arguments["key_mask"].sum(1, keepdim=True)
    assert (kept_lens == real.clamp(max=budget)).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_priority_with_padding(backend: Backend, per_head: bool) -> None:
    """Padding is never kept, whatever its priority."""
    arguments = make_arguments(shapes.LEFT_PADDED, backend.device, budget=40)
    size = (3, 2, 150) if per_head else (3, 150)
    arguments["priority"] = torch.randint(0, 4, size, dtype=torch.uint8, device=backend.device)
    (kept_indices, kept_lens, _), _ = assert_composition(backend, arguments)
    kept = arguments["key_mask"][:, None].expand(-1, 2, -1).gather(2, kept_indices.clamp(0).long())
    valid = torch.arange(40, device=backend.device) < kept_lens[..., None]
    assert kept[valid].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8], ids=str)
def test_value_of_another_dtype_and_head_dim(backend: Backend, dtype: torch.dtype) -> None:
    arguments = make_arguments(shapes.ODD, backend.device)
    arguments["value"] = shapes.make_tensor(3, 2, 13, 40, dtype=dtype, device=backend.device)
    assert_composition(backend, arguments)


@pytest.mark.parametrize("shared", [True, False])
def test_all_rows_of_one_group(backend: Backend, shared: bool) -> None:
    shape = replace(shapes.GROUP_1, left_padding=(0, 4))
    arguments = make_arguments(shape, backend.device)
    reduction = HeadReduction.ALL_MEAN if shared else HeadReduction.NONE
    (kept_indices, _, _), _ = assert_composition(
        backend, {**arguments, "head_reduction": reduction}
    )
    assert kept_indices.shape[1] == (1 if shared else 3)


def test_text_weighted_with_padding(backend: Backend) -> None:
    arguments = make_arguments(shapes.LEFT_PADDED, backend.device, torch.bfloat16, budget=33)
    arguments |= {"row_index": make_rows(3, 60, 150, backend.device), "text_weighted": True}
    assert_composition(backend, arguments)


def test_only_key_and_value_are_written(backend: Backend) -> None:
    arguments = make_arguments(shapes.SLICED, backend.device)
    before = clone(arguments)
    backend.op(OP)(**arguments)
    for name in ("query", "key_mask"):
        assert_same_bytes(arguments[name], before[name])
