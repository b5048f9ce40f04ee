"""The parts of score_and_compact that are its own: the pool and the composition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvevict import reference
from kvevict.reference.score_and_compact import pool_scores

KEYS = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), max_size=9)


@given(keys=KEYS, half=st.integers(0, 5))
def test_pool(keys: list[tuple[int, int]], half: int) -> None:
    pool_kernel = 2 * half + 1
    scores = torch.tensor([float(score) for score, _ in keys], dtype=torch.float64)
    priority = torch.tensor([level for _, level in keys], dtype=torch.uint8)
    expected = []
    for j, (score, level) in enumerate(keys):
        near = keys[max(0, j - half) : j + half + 1]
        mean = sum(other for other, other_level in near if other_level == 1) / pool_kernel
        expected.append(mean if level == 1 else score)
    actual = pool_scores(scores, priority, pool_kernel)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_composition() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 8) for _ in range(3))
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[0, :2] = False
    original = key.clone(), value.clone()
    kept_indices, kept_lens, scores = reference.score_and_compact(
        query, key, value, 5, key_mask=key_mask
    )
    assert kept_lens.tolist() == [[4, 4], [5, 5]]  # a masked key is never kept
    torch.testing.assert_close(scores, reference.score_keys(query, original[0], key_mask=key_mask))
    for source, moved in zip(original, (key, value), strict=True):
        ((gathered,), _) = reference.gather_kv([source], [source], kept_indices, kept_lens)
        for b in range(2):
            count = int(kept_lens[b, 0])
            assert torch.equal(moved[b, :, :count], gathered[b, :, :count])


def test_text_weighted_uses_the_shared_list() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    row_index = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    expected, _, _ = reference.score_keys_by_text(query, key, row_index)
    kept_indices, _, scores = reference.score_and_compact(
        query, key, value, 3, row_index=row_index, text_weighted=True
    )
    torch.testing.assert_close(scores, expected)
    assert kept_indices.tolist() == reference.select_topk(expected, 3)[0].tolist()
