"""Published methods worked out by hand.

TGV-KV (arXiv 2606.03075), SnapKV (2404.14469) and LightKV (2605.00789).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.reference.score_and_compact import pool_scores
from tests.support.merging import assert_light_kv_merge, light_kv_example

# Token 0 is text, 1 to 4 are vision, 5 to 7 are text. Attention of rows 5 to 7, mean of all heads.
VISION = slice(1, 5)
TGV_ATTENTION = torch.tensor(
    [
        [
            [0.10, 0.20, 0.05, 0.10, 0.15, 0.40, 0, 0],
            [0.10, 0.10, 0.10, 0.20, 0.05, 0.25, 0.20, 0],
            [0.05, 0.05, 0.30, 0.10, 0.05, 0.10, 0.15, 0.20],
        ],
        [
            [0.50, 0.10, 0.10, 0.05, 0.05, 0.20, 0, 0],
            [0.15, 0.10, 0.05, 0.10, 0.10, 0.10, 0.40, 0],
            [0.25, 0.10, 0.05, 0.05, 0.10, 0.05, 0.30, 0.10],
        ],
    ],
    dtype=torch.float64,
)


def query_with_attention(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key of two heads whose mean attention [num_rows, kv_len] is `attention`."""
    difference = torch.zeros_like(attention)
    difference[:, 0], difference[:, 1] = 0.01, -0.01
    heads = torch.stack([attention + difference, attention - difference])
    key = torch.eye(attention.shape[1], dtype=torch.float64)
    return heads.log().clamp(min=-100)[None], key.expand(1, 1, -1, -1)


def score_layer(layer: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key = query_with_attention(TGV_ATTENTION[layer])
    row_index = torch.arange(3, dtype=torch.int32)[None]
    return reference.score_keys_by_text(query, key, row_index, sm_scale=1.0)


def test_tgv_scores() -> None:
    scores, column_sums, row_weights = score_layer(0)
    assert row_weights[0].tolist() == pytest.approx([0.25, 0.175, 0.20])
    assert scores[0, 0, VISION].tolist() == pytest.approx([0.0775, 0.09, 0.08, 0.05625])
    assert float(column_sums[0, 0, VISION].sum()) == pytest.approx(1.45)
    scores, column_sums, _ = score_layer(1)
    expected = [0.05667, 0.03417, 0.04583, 0.05083]
    assert scores[0, 0, VISION].tolist() == pytest.approx(expected, abs=5e-6)
    assert float(column_sums[0, 0, VISION].sum()) == pytest.approx(0.95)


@pytest.mark.parametrize(("layer", "budget", "kept"), [(0, 5, [0, 2, 5, 6, 7]), (1, 3, [0, 6, 7])])
def test_tgv_keeps_sinks_then_text_then_vision(layer: int, budget: int, kept: list[int]) -> None:
    scores, column_sums, _ = score_layer(layer)
    is_text = torch.tensor([True, False, False, False, False, True, True, True])
    mixed = torch.where(is_text, column_sums, scores)
    priority = torch.tensor([[3, 1, 1, 1, 1, 2, 2, 3]], dtype=torch.uint8)
    kept_indices, _ = reference.select_topk(mixed, budget, priority=priority)
    assert kept_indices[0, 0].tolist() == kept


def test_snapkv() -> None:
    # The queries of the window (the last two tokens), two heads that share one KV head.
    query = torch.tensor([[[[1.0, 2], [2, 0]], [[0, 1], [1, 1]]]])
    key = torch.tensor([[3.0, 4], [4, 3], [3, 4], [0, 5], [4, -3], [5, 0], [3, 4], [4, 3]])
    key = (key / 5).view(1, 1, 8, 2)
    priority = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.uint8)
    kept_indices, kept_lens, scores = reference.score_and_compact(
        query,
        key,
        key.clone(),
        5,
        row_weight=torch.full((1, 2), 0.5),
        priority=priority,
        pool_kernel=3,
    )
    pooled = pool_scores(scores, priority[:, None], 3)[0, 0, :6]
    expected = [0.10055, 0.15129, 0.14319, 0.11827, 0.10723, 0.06459]
    assert pooled.tolist() == pytest.approx(expected, abs=5e-6)
    assert kept_indices.tolist() == [[[1, 2, 3, 6, 7]]]
    assert kept_lens.tolist() == [[5]]


def test_light_kv_merges_half_of_the_sources() -> None:
    lists, guidance = light_kv_example("cpu")
    match_index, similarity = reference.match_tokens(**lists)
    assert match_index.flatten().tolist() == [2, 6, 2, 6]
    expected = [0.89443, 1.0, 0.98995, 0.70711]
    assert similarity.flatten().tolist() == pytest.approx(expected, abs=5e-6)
    kept, _ = reference.select_topk(similarity.float(), 2)
    assert lists["source_index"].gather(2, kept.long()).tolist() == [[[3, 5]]]
    chosen = torch.full_like(match_index, -1).scatter(
        2, kept.long(), match_index.gather(2, kept.long())
    )
    tokens = lists["tokens"]
    reference.merge_tokens_([tokens], lists["source_index"], chosen, guidance)
    assert_light_kv_merge(tokens)
