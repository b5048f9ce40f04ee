"""Budgets that several policies compute alike: layers that share by mass, prompts that fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvevict.policies.base import LayerScores, Policy


def share_by_mass(policy: Policy, layers: Sequence[LayerScores], *, redistribute: bool) -> Tensor:
    """Share num_layers * keep among the layers in proportion to their mass.

    Args:
        policy: whose `keep` is shared.
        layers: layers with a mass; where there is none at all, they share evenly.
        redistribute: give what layers beyond 1 cannot use to the others (water filling).

    Returns:
        [num_layers, batch_size] float64, the fraction of its keys that a layer may keep; without
        `redistribute` it may exceed 1.
    """
    lens = torch.stack([layer.prompt.lens for layer in layers]).double()
    totals = torch.stack([layer.prompt.totals for layer in layers]).double()
    ratio = torch.stack([policy.keep_ratio(layer.prompt) for layer in layers])
    # totals / lens is 1 on a fresh prompt.
    share = _shares(layers) * totals / lens.clamp(min=1)
    fraction = len(layers) * ratio * share
    return fill(fraction, share) if redistribute else fraction


def floor_share(count: Tensor, share: float | Tensor) -> Tensor:
    """Return count * share rounded down, int64; the nudge keeps 0.29 * 100 at 29."""
    return (count.double() * share + 1e-6).long()


def keep_whole(policy: Policy, layers: Sequence[LayerScores], budgets: Tensor) -> Tensor:
    """Raise the budgets of sequences that fit into `keep` to all their keys.

    Args:
        policy: whose `keep` it is; None holds no sequence.
        layers: the layers.
        budgets: [num_layers, batch_size] or [num_layers, batch_size, num_lists].
    """
    if policy.keep is None:
        return budgets
    lens = torch.stack([layer.prompt.lens for layer in layers])
    fits = torch.stack([policy.keep_tokens(layer.prompt) for layer in layers]) >= lens
    if budgets.dim() == 3:
        lens, fits = lens[..., None], fits[..., None]
    return budgets.where(~fits, lens)


def _shares(layers: Sequence[LayerScores]) -> Tensor:
    """Return each layer's share of the mass [num_layers, batch_size] float64, sums to 1."""
    mass = torch.stack(
        [
            torch.zeros(layer.scores.shape[0], device=layer.scores.device)
            if layer.mass is None
            else layer.mass
            for layer in layers
        ]
    ).double()
    total = mass.sum(0)
    even = torch.full_like(mass, 1 / len(layers))
    return (mass / total.where(total > 0, 1.0)).where(total > 0, even)


def fill(fraction: Tensor, share: Tensor) -> Tensor:
    """Move what exceeds 1 to the other layers, by share, until no layer exceeds 1 or all are full.

    Both [num_layers, batch_size] float64. The sum over layers is kept where it is at most
    num_layers. At least one layer per round becomes full, so num_layers rounds are enough.
    """
    total = fraction.sum(0)
    full = torch.zeros_like(fraction, dtype=torch.bool)
    for _ in range(fraction.shape[0]):
        full = full | (fraction > 1)
        rest = share.masked_fill(full, 0.0)
        left = (total - full.sum(0)).clamp(min=0)
        filled = left * rest / rest.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
        fraction = filled.masked_fill(full, 1.0)
    return fraction
