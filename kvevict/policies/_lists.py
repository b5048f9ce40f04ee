"""Lists of keys, as masks."""

from __future__ import annotations

import torch
from torch import Tensor


def in_list(index: Tensor, kv_len: int) -> Tensor:
    """Return which keys are in a list.

    Args:
        index: [..., k] int32, positions, -1 = none.
        kv_len: number of keys.

    Returns:
        [..., kv_len] bool.
    """
    shape = (*index.shape[:-1], kv_len + 1)
    found = torch.zeros(shape, dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index.where(index >= 0, kv_len).long(), True)[..., :kv_len]
