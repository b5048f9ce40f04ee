"""LightKV's merging by loops over Python lists in float64, written from the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.policies import LightKV
from tests.policies.oracles import windows_of


def merge_by_loops(
    hidden: Tensor, query: Tensor, key: Tensor, row: str, policy: LightKV, stage: int
) -> tuple[list[int], Tensor]:
    """Merge one sequence without padding.

    Args:
        hidden: [length, hidden].
        query: [num_qo_heads, length, head_dim].
        key: [num_kv_heads, length, head_dim].
        row: a letter per token.
        policy: what and how much.
        stage: which of its stages.

    Returns:
        The rows that are left, and the hidden states of all rows in float64.
    """
    window = policy.windows[stage % len(policy.windows)]
    drop = policy.drop[stage % len(policy.drop)]
    x, length = hidden.double().clone(), len(row)
    images, begin = [], 0
    for end in range(1, length + 1):
        if end == length or row[end] != row[begin]:
            if row[begin] in "iv":
                images.append(range(begin, end))
            begin = end
    if any(len(image) < 8 * window**2 for image in images):
        return list(range(length)), x
    weight = torch.ones(length, dtype=torch.float64)
    if policy.guidance == "text":
        repeated = key.double().repeat_interleave(len(query) // len(key), 0)
        logits = query.double() @ repeated.mT / query.shape[-1] ** 0.5
        text = [j for j, letter in enumerate(row) if letter not in "iv"]
        weight = logits.softmax(1)[:, :, text].sum((0, 2))
    gone: set[int] = set()
    merged = x.clone()
    for image in images:
        for members in windows_of(list(image), window):
            sources, targets = members[::2], members[1::2]
            best = []
            for a in sources:
                similarity = [
                    float(x[a] @ x[b] / (x[a].norm() * x[b].norm() + 1e-8)) for b in targets
                ]
                most = max(range(len(targets)), key=lambda i: (similarity[i], -i))
                best.append((-similarity[most], a, targets[most]))
            count = min(int(drop * len(members)), len(members) // 2)
            pairs = sorted(best)[:count]
            for b in {b for *_, b in pairs}:
                group = [b, *(a for _, a, own in pairs if own == b)]
                w = weight[group, None]
                merged[b] = (w * x[group]).sum(0) / w.sum()
            gone |= {a for _, a, _ in pairs}
    return [j for j in range(length) if j not in gone], merged
