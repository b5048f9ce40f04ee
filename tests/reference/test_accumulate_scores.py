"""The oracle of accumulate_scores_ against a loop over keys."""

from __future__ import annotations

import torch

from kvevict import reference
from tests.reference.naive import attention_row


def test_accumulate_scores() -> None:
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 7, 8)
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[1, :3] = False
    scores = torch.rand(2, 2, 9, dtype=torch.float64)
    before = scores.clone()
    reference.accumulate_scores_(scores, query, key, decay=0.25, key_mask=key_mask)
    for b in range(2):
        for group in range(2):
            heads = (2 * group, 2 * group + 1)
            rows = [attention_row(query, key, b, h, 0, key_mask=key_mask)[0] for h in heads]
            for j in range(7):
                received = float(rows[0][j] + rows[1][j]) / 2
                expected = 0.25 * float(before[b, group, j]) + received
                assert abs(float(scores[b, group, j]) - expected) < 1e-12
    assert torch.equal(scores[..., 7:], before[..., 7:])
