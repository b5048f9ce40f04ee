"""accumulate_scores_: equal to decay, score_keys and addition, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import HeadReduction
from tests.support import shapes
from tests.support.backends import Backend
from tests.support.checks import assert_same_bytes, clone, to_cpu
from tests.support.samples import Arguments
from tests.support.scoring import attention_arguments, spoil_padding
from tests.support.shapes import Shape
from tests.support.tolerances import assert_scores_close

OP = "accumulate_scores_"
# Scoring itself is tested with score_keys.
SHAPES_AND_DTYPES = [
    *((shape, torch.float32) for shape in (shapes.SMALLEST, shapes.ODD, shapes.ALL_PADDED)),
    *((shape, torch.float32) for shape in shapes.EMPTY),
    (shapes.GROUP_7, torch.float16),
    (shapes.SLICED, torch.bfloat16),
]


def make_arguments(
    shape: Shape,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    head_reduction: int = HeadReduction.GROUP_MEAN,
    room: int = 5,
) -> Arguments:
    """Return a call with scores that have room for more keys."""
    attention = attention_arguments(shape, device, dtype)
    num_heads = (shape.num_qo_heads, shape.num_kv_heads, shape.num_kv_heads, 1)[head_reduction]
    scores = torch.randn(shape.batch_size, num_heads, shape.kv_len + room, device=device)
    return {"scores": scores, **attention, "head_reduction": head_reduction}


def composition(backend: Backend, arguments: Arguments) -> Tensor:
    """Return what score_keys and two operators of torch make of the scores."""
    rest = {name: value for name, value in arguments.items() if name not in ("scores", "decay")}
    scores = arguments["scores"].clone()
    new_scores = backend.op("score_keys")(**rest)
    scores[..., : new_scores.shape[2]].mul_(arguments.get("decay", 1.0)).add_(new_scores)
    return scores


def assert_accumulates(backend: Backend, arguments: Arguments) -> None:
    """Assert equality with the composition, bit for bit, and closeness to the oracle."""
    expected = composition(backend, arguments)
    exact = to_cpu(arguments)
    exact["scores"] = exact["scores"].double()
    reference.accumulate_scores_(**exact)
    backend.op(OP)(**arguments)
    assert_same_bytes(arguments["scores"], expected)
    assert_scores_close(arguments["scores"], exact["scores"])


@pytest.mark.every_isa
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)
def test_matches_composition_and_oracle(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    assert_accumulates(backend, make_arguments(shape, backend.device, dtype))
    assert_accumulates(backend, make_arguments(shape, backend.device, dtype) | {"decay": 0.98})


@pytest.mark.every_isa
@pytest.mark.parametrize("decay", [1.0, 0.98, 1 / 3, 0.0, -1.5])
def test_the_product_is_rounded_before_the_sum(backend: Backend, decay: float) -> None:
    """Long rows: vectors, tails and several blocks; a fused multiply-add differs somewhere."""
    shape = Shape("long", 1, 2, 2, 1, 4_103, 8)
    assert_accumulates(backend, make_arguments(shape, backend.device) | {"decay": decay})


@pytest.mark.parametrize(
    ("head_reduction", "causal"), list(itertools.product(HeadReduction, [True, False]))
)
def test_modes(backend: Backend, head_reduction: int, causal: bool) -> None:
    shape = shapes.HOLES
    arguments = make_arguments(shape, backend.device, head_reduction=head_reduction)
    arguments |= {"causal": causal, "decay": 0.9, "sm_scale": -0.3}
    assert_accumulates(backend, clone(arguments))
    for heads in ((), (shape.num_qo_heads,)):
        row_weight = torch.rand(shape.batch_size, *heads, shape.qo_len, device=backend.device)
        assert_accumulates(backend, clone(arguments) | {"row_weight": row_weight})


def test_decoding_adds_up_to_the_scores_of_all_rows(backend: Backend) -> None:
    """One row after the other, with a decay, is one call of score_keys with weights by age."""
    shape = Shape("decoding", 2, 4, 2, 7, 30, 16, left_padding=(0, 11))
    arguments = attention_arguments(shape, backend.device)
    query, key, mask = arguments["query"], arguments["key"], arguments["key_mask"]
    scores = torch.zeros(2, 2, 64, device=backend.device)
    for step in range(7):
        kv_len = 24 + step
        backend.op(OP)(
            scores,
            query[:, :, step : step + 1],
            key[:, :, :kv_len],
            key_mask=mask[:, :kv_len],
            decay=0.9,
        )
    row_weight = (0.9 ** torch.arange(6, -1, -1, device=backend.device)).expand(2, 7)
    expected = reference.score_keys(**to_cpu(arguments), row_weight=row_weight.cpu())
    assert_scores_close(scores[..., :30], expected)
    assert (scores[..., 30:] == 0).all()


def test_free_slots_behind_the_newest_token(backend: Backend) -> None:
    """A static cache: not causal, and the mask says which slots are taken."""
    arguments = attention_arguments(Shape("static", qo_len=1, kv_len=40), backend.device)
    taken = torch.tensor([[9], [33]], device=backend.device)
    arguments["key_mask"] = torch.arange(40, device=backend.device) < taken
    scores = torch.zeros(2, 2, 40, device=backend.device)
    backend.op(OP)(scores, **arguments, causal=False)
    for b, kv_len in enumerate((9, 33)):
        expected = reference.score_keys(
            arguments["query"][b : b + 1].cpu(), arguments["key"][b : b + 1, :, :kv_len].cpu()
        )
        assert_scores_close(scores[b : b + 1, :, :kv_len], expected)
        assert (scores[b, :, kv_len:] == 0).all()


def test_padding_may_hold_anything(backend: Backend) -> None:
    arguments = make_arguments(shapes.LEFT_PADDED, backend.device) | {"decay": 0.5}
    spoiled = spoil_padding(clone(arguments))
    before = arguments["scores"].clone()
    backend.op(OP)(**arguments)
    backend.op(OP)(**spoiled)
    assert_same_bytes(spoiled["scores"], arguments["scores"])
    masked = ~arguments["key_mask"][:, None].expand(-1, 2, -1)
    kv_len = shapes.LEFT_PADDED.kv_len
    assert_same_bytes(arguments["scores"][..., :kv_len][masked], before[..., :kv_len][masked] / 2)


def test_nan_stays_and_spreads_to_the_keys_that_its_row_sees(backend: Backend) -> None:
    arguments = make_arguments(Shape("nan", 1, 2, 2, 1, 40, 16), backend.device)
    arguments["scores"][0, 0, 3] = torch.nan
    arguments["query"][0, 1, 0, 5] = torch.nan
    backend.op(OP)(**arguments, decay=0.0)
    nan = arguments["scores"].isnan()[0]
    assert nan[0].nonzero().flatten().tolist() == [3]
    assert nan[1, :40].all() and not nan[1, 40:].any()


@pytest.mark.parametrize("room", [0, 1, 100])
def test_writes_only_its_keys(backend: Backend, room: int) -> None:
    """Scores may be a slice of a larger buffer, here [heads, layers, batch, capacity]."""
    arguments = make_arguments(shapes.ODD, backend.device) | {"decay": 0.9}
    kv_len = shapes.ODD.kv_len
    whole = torch.rand(4, 2, 3, kv_len + room + 4, device=backend.device)
    scores = whole[1:3, 1, :, 2 : 2 + kv_len + room].transpose(0, 1)
    before = whole.clone()
    expected = composition(backend, arguments | {"scores": scores})
    backend.op(OP)(**arguments | {"scores": scores})
    assert_same_bytes(scores, expected)
    updated = whole[1:3, 1, :, 2 : 2 + kv_len]
    updated.copy_(before[1:3, 1, :, 2 : 2 + kv_len])
    assert_same_bytes(whole, before)


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Scores of two sequences more than 2**31 elements apart; few pages are ever touched."""
    arguments = make_arguments(shapes.SMALLEST, backend.device) | {"decay": 0.5}
    arguments |= {name: arguments[name].expand(2, -1, -1, -1) for name in ("query", "key")}
    whole = torch.empty(2**31 + 64, device=backend.device)
    far = whole.as_strided((2, 1, 6), (2**31, 6, 1))
    far.copy_(torch.rand(2, 1, 6))
    expected = composition(backend, arguments | {"scores": far})
    backend.op(OP)(**arguments | {"scores": far})
    assert_same_bytes(far, expected)


@pytest.mark.parametrize("argument", ["query", "key", "row_weight"])
def test_scores_must_not_overlap_what_is_read(backend: Backend, argument: str) -> None:
    arguments = make_arguments(Shape("overlap", 1, 1, 1, 8, 8, 8), backend.device)
    arguments |= {"row_weight": torch.rand(1, 8, device=backend.device), "causal": False}
    scores = arguments[argument].view(1, 1, -1)
    before = scores.clone()
    with pytest.raises(ValueError, match=f"{argument} must not overlap scores"):
        backend.op(OP)(**arguments | {"scores": scores})
    assert torch.equal(scores, before)


def test_scores_must_not_overlap_themselves(backend: Backend) -> None:
    arguments = make_arguments(shapes.ODD, backend.device)
    arguments["scores"] = arguments["scores"][:, :1].expand(-1, 2, -1)
    with pytest.raises(ValueError, match="scores must not overlap itself"):
        backend.op(OP)(**arguments)
