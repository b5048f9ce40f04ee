"""Oracle of `kvevict.key_diversity`."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_NORM = 1e-12


def key_diversity(key: Tensor, *, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return similarity [batch_size, num_kv_heads, kv_len] and redundancy [.., num_kv_heads].

    A real key with a NaN, an infinity or a squared norm beyond float32 makes both NaN for its
    sequence and head.
    """
    key = key.double()
    real = torch.ones_like(key[..., 0], dtype=torch.bool)
    if key_mask is not None:
        real = key_mask[:, None].expand_as(real)
    num_keys = real.sum(-1)

    norm = key.norm(dim=-1, keepdim=True)
    norm = norm.where(norm.square() <= torch.finfo(torch.float32).max, torch.nan)
    unit = (key / norm.clamp(min=MIN_NORM)).where(real[..., None], 0.0)
    mean = unit.sum(2) / num_keys.clamp(min=1)[..., None]
    similarity = (unit * mean[:, :, None]).sum(-1).where(real, 0.0)

    between_others = (num_keys * mean.square().sum(-1) - 1) / (num_keys - 1)
    redundancy = between_others.clamp(0, 1).where(num_keys >= 2, 0.0)
    return similarity, redundancy
