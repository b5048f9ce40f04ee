"""mix_scores against its oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict.ops.enums import DiversityReference
from tests.support.backends import Backend
from tests.support.checks import Arguments, assert_matches_oracle, assert_same_bytes

OP = "mix_scores"
SIZES = [(1, 1, 1), (2, 3, 21), (3, 2, 331), (1, 2, 4100)]
every_reference = pytest.mark.parametrize("reference", list(DiversityReference))


def make_arguments(size: tuple[int, ...], device: str) -> Arguments:
    """Return the arguments that models give: positive scores, similar keys, norms around 10."""
    scores, similarity, value_norm = torch.rand(3, *size)
    arguments = {
        "scores": scores.square() * 1e-3,
        "similarity": 0.6 + 0.3 * similarity,
        "value_norm": 5 + 10 * value_norm,
        "redundancy": torch.rand(size[:2]),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()}


def make_priority(size: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(0, 4, size, dtype=torch.uint8).clamp(max=2).to(device)


@pytest.mark.every_isa
@every_reference
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_oracle(backend: Backend, size: tuple[int, ...], reference: int) -> None:
    arguments = {**make_arguments(size, backend.device), "diversity_reference": reference}
    for priority_size in (None, (size[0], size[2]), size):
        priority = None if priority_size is None else make_priority(priority_size, backend.device)
        assert_matches_oracle(backend, OP, {**arguments, "priority": priority})


@pytest.mark.parametrize("kv_len", [8193, 20_011])
def test_long_rows(backend: Backend, kv_len: int) -> None:
    """Long enough that a row is shared out, should a backend do that."""
    size = (1, 2, kv_len)
    arguments = make_arguments(size, backend.device)
    assert_matches_oracle(backend, OP, arguments)
    arguments["priority"] = make_priority(size, backend.device)
    arguments["priority"][:, :, 2500:9000] = 0  # no candidates for long
    assert_matches_oracle(backend, OP, arguments)


@pytest.mark.every_isa
def test_values_that_hardly_differ(backend: Backend) -> None:
    arguments = make_arguments((2, 2, 700), backend.device)
    arguments["similarity"] = 0.9 + arguments["similarity"] * 1e-5
    arguments["value_norm"] = 1e4 + arguments["value_norm"] * 1e-2
    assert_matches_oracle(backend, OP, arguments)


@every_reference
def test_constants(backend: Backend, reference: int) -> None:
    arguments = {**make_arguments((2, 2, 50), backend.device), "diversity_reference": reference}
    for constant in ("scores", "similarity", "value_norm", "redundancy"):
        same = torch.full_like(arguments[constant], 0.25)
        mixed = assert_matches_oracle(backend, OP, {**arguments, constant: same})
        assert mixed.isfinite().all()


def test_redundancy_weighs(backend: Backend) -> None:
    arguments = make_arguments((1, 2, 60), backend.device)
    arguments["redundancy"][:] = torch.tensor([0.0, 1.0])
    mixed = assert_matches_oracle(backend, OP, arguments)
    importance, diversity = mixed[0]
    scores, similarity = arguments["scores"][0], arguments["similarity"][0]
    assert (importance >= scores[0]).all()  # attention plus norms
    assert torch.equal(diversity.argsort(), similarity[1].argsort(descending=True))
    torch.testing.assert_close(importance.mean(), 2 * scores[0].mean())
    torch.testing.assert_close(diversity.mean(), scores[1].mean())


def test_scores_of_any_sign(backend: Backend) -> None:
    arguments = make_arguments((2, 3, 211), backend.device)
    for name in ("scores", "similarity", "value_norm"):
        arguments[name] = torch.randn_like(arguments[name])
    assert_matches_oracle(backend, OP, arguments, terms=30.0)


@pytest.mark.every_isa
def test_keys_that_are_no_candidates_may_hold_anything(backend: Backend) -> None:
    size = (2, 3, 133)
    arguments = make_arguments(size, backend.device)
    arguments["priority"] = priority = make_priority(size, backend.device)
    expected = backend.op(OP)(**arguments)
    for name, value in (("scores", torch.nan), ("similarity", torch.inf), ("value_norm", -1e30)):
        arguments[name] = arguments[name].masked_fill(priority != 1, value)
    mixed = backend.op(OP)(**arguments)
    assert_same_bytes(mixed.masked_fill(priority != 1, 0), expected.masked_fill(priority != 1, 0))
    scores = arguments["scores"]
    assert_same_bytes(mixed[priority != 1], scores[priority != 1])


def test_a_row_without_candidates_is_left_alone(backend: Backend) -> None:
    arguments = make_arguments((2, 2, 40), backend.device)
    priority = torch.ones(2, 2, 40, dtype=torch.uint8, device=backend.device)
    priority[0, 1], priority[1, 1] = 0, 2
    mixed = assert_matches_oracle(backend, OP, {**arguments, "priority": priority})
    assert_same_bytes(mixed[:, 1], arguments["scores"][:, 1])
    assert (mixed[:, 0] != arguments["scores"][:, 0]).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("kv_len", [37, 8500])
@pytest.mark.parametrize("name", ["scores", "similarity", "value_norm", "redundancy"])
def test_nan_is_not_hidden(backend: Backend, name: str, kv_len: int) -> None:
    arguments = make_arguments((2, 2, kv_len), backend.device)
    priority = torch.ones(2, kv_len, dtype=torch.uint8, device=backend.device)
    priority[:, 30] = 2
    arguments["priority"] = priority
    expected = backend.op(OP)(**arguments)
    arguments[name][1:2, :1].flatten()[-1] = torch.nan
    mixed = backend.op(OP)(**arguments)
    assert mixed[1, 0, priority[1] == 1].isnan().all()
    mixed[1, 0, priority[1] == 1] = 0
    expected[1, 0, priority[1] == 1] = 0
    assert_same_bytes(mixed, expected)


@pytest.mark.parametrize("name", ["similarity", "value_norm"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_makes_a_row_nan(backend: Backend, name: str, value: float) -> None:
    arguments = make_arguments((1, 2, 37), backend.device)
    arguments[name][0, 1, 11] = value
    mixed = assert_matches_oracle(backend, OP, arguments)
    assert mixed[0, 1].isnan().all() and mixed[0, 0].isfinite().all()


@pytest.mark.parametrize("size", [(0, 2, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(backend: Backend, size: tuple[int, ...]) -> None:
    assert backend.op(OP)(**make_arguments(size, backend.device)).shape == size


def test_mixkv_keeps_what_the_paper_would(backend: Backend) -> None:
    """A prompt of 8 tokens by hand: the window is kept, and of the others the most diverse."""
    device = backend.device
    key = torch.tensor([[3.0, 4], [4, 3], [3, 4], [0, 5], [4, -3], [5, 0], [3, 4], [4, 3]]) / 5
    key = torch.nn.functional.pad(key, (0, 6)).view(1, 1, 8, 8).to(device)
    priority = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.uint8, device=device)
    attention = [0.10055, 0.15129, 0.14319, 0.11827, 0.10723, 0.06459, 0.3, 0.4]
    scores = torch.tensor(attention, device=device).view(1, 1, 8)
    value_norm = torch.tensor([1.0, 2, 3, 1, 2, 4, 2**0.5, 2**0.5], device=device).view(1, 1, 8)

    similarity, redundancy = backend.op("key_diversity")(key)
    assert similarity[0, 0, :6].tolist() == pytest.approx([0.79, 0.82, 0.79, 0.50, 0.22, 0.65])
    assert float(redundancy) == pytest.approx(0.62571, abs=1e-5)
    mixed = backend.op(OP)(scores, similarity, value_norm, redundancy, priority=priority)
    expected = [0.04882, 0.09326, 0.13804, 0.16355, 0.30043, 0.19744, 0.3, 0.4]
    assert mixed[0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    kept_indices, kept_lens = backend.op("select_topk")(mixed, 5, priority=priority)
    assert kept_indices.tolist() == [[[3, 4, 5, 6, 7]]] and kept_lens.tolist() == [[5]]
