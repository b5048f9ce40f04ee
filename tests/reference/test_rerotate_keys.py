"""The oracle of rerotate_keys_ against complex numbers, one pair at a time."""

from __future__ import annotations

import cmath

import pytest
import torch
from torch import Tensor

from kvevict import reference


def position_of(positions: Tensor, axis: int, layer: int, b: int, h: int, slot: int) -> int:
    """Return a position, by the forms in words: [num_axes, (layers,) batch, (heads,) kv_len]."""
    of_axis = positions[axis]
    if of_axis.dim() == 4:
        of_axis = of_axis[layer if of_axis.shape[0] > 1 else 0]
    of_sequence = of_axis[b]
    if of_sequence.dim() == 2:
        of_sequence = of_sequence[h if of_sequence.shape[0] > 1 else 0]
    return int(of_sequence[slot])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [((2,), (2, 3)), ((2, 1), (4, 2, 1)), ((1, 2, 3), (2,)), ((4, 2, 3), (4, 2, 3))],
)
def test_rerotate_keys(old: tuple[int, ...], new: tuple[int, ...], interleaved: bool) -> None:
    keys = [torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(4)]
    before = [key.clone() for key in keys]
    old_positions = torch.randint(-1, 4, (2, *old, 5), dtype=torch.int32)
    new_positions = torch.randint(-1, 4, (2, *new, 5), dtype=torch.int32)
    inv_freq, axis_of_freq = torch.rand(3), torch.tensor([1, 0, 1], dtype=torch.int32)
    reference.rerotate_keys_(
        keys,
        old_positions,
        new_positions,
        inv_freq,
        axis_of_freq=axis_of_freq,
        interleaved=interleaved,
    )
    moved = 0
    for layer, (key, old_key) in enumerate(zip(keys, before, strict=True)):
        for b, h, slot in torch.cartesian_prod(*map(torch.arange, (2, 3, 5))).tolist():
            place = (layer, b, h, slot)
            sources = [position_of(old_positions, axis, *place) for axis in range(2)]
            targets = [position_of(new_positions, axis, *place) for axis in range(2)]
            expected = old_key[b, h, slot].clone()
            if min(sources + targets) >= 0:
                moved += sources != targets
                for c, axis in enumerate(axis_of_freq.tolist()):
                    pair = [2 * c, 2 * c + 1] if interleaved else [c, c + 3]
                    angle = (targets[axis] - sources[axis]) * float(inv_freq[c])
                    turned = complex(*expected[pair].tolist()) * cmath.exp(1j * angle)
                    expected[pair] = torch.tensor([turned.real, turned.imag], dtype=torch.float64)
            torch.testing.assert_close(key[b, h, slot], expected, rtol=0, atol=1e-12)
    assert moved > 10


def test_one_axis_needs_no_table() -> None:
    keys = [torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)]
    with_axis = [key.clone() for key in keys]
    old = torch.tensor([[5, 0, -1]], dtype=torch.int32)
    new = torch.tensor([[[7, 0, 2], [1, 3, 3]]], dtype=torch.int32)
    inv_freq = torch.tensor([0.7, 0.1])
    reference.rerotate_keys_(keys, old, new, inv_freq)
    axis_of_freq = torch.zeros(2, dtype=torch.int32)
    reference.rerotate_keys_(with_axis, old[None], new[None], inv_freq, axis_of_freq=axis_of_freq)
    assert all(torch.equal(a, b) for a, b in zip(keys, with_axis, strict=True))


def test_no_layers() -> None:
    nothing = torch.empty(0, 0, dtype=torch.int32)
    reference.rerotate_keys_([], nothing, nothing, torch.ones(1))
