"""Methods worked out by hand: TGV-KV, SnapKV, HAE, MixKV, LightKV.

They are arXiv 2606.03075, 2404.14469, 2602.02197, 2510.20707, 2605.00789.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.reference.mix_scores import scale_to
from kvevict.reference.score_and_compact import pool_scores
from tests.support.merging import assert_light_kv_merge, light_kv_example
from tests.support.worked_examples import (
    HAE_ATTENTION,
    HAE_CANDIDATES,
    HAE_DECISIONS,
    query_of_heads,
)

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
    return query_of_heads(torch.stack([attention + difference, attention - difference]))


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


# MixKV and SnapKV: 8 tokens, the last two are the window, its queries of two heads share a KV head.
WINDOW_QUERY = torch.tensor([[[[1.0, 2], [2, 0]], [[0, 1], [1, 1]]]])
KEY = torch.tensor([[3.0, 4], [4, 3], [3, 4], [0, 5], [4, -3], [5, 0], [3, 4], [4, 3]])
KEY = (KEY / 5).view(1, 1, 8, 2)
VALUE = torch.tensor([[1.0, 0], [2, 0], [0, 3], [1, 0], [0, 2], [4, 0], [1, 1], [1, 1]])
PRIORITY = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.uint8)
POOLED = [0.10055, 0.15129, 0.14319, 0.11827, 0.10723, 0.06459]


def test_snapkv() -> None:
    kept_indices, kept_lens, scores = reference.score_and_compact(
        WINDOW_QUERY,
        KEY.clone(),
        KEY.clone(),
        5,
        row_weight=torch.full((1, 2), 0.5),
        priority=PRIORITY,
        pool_kernel=3,
    )
    pooled = pool_scores(scores, PRIORITY[:, None], 3)[0, 0, :6]
    assert pooled.tolist() == pytest.approx(POOLED, abs=5e-6)
    assert kept_indices.tolist() == [[[1, 2, 3, 6, 7]]]
    assert kept_lens.tolist() == [[5]]


def score_text_rows(statistic: Statistic) -> Tensor:
    query, key = query_of_heads(HAE_ATTENTION)
    return reference.score_keys(
        query, key, sm_scale=1.0, statistic=statistic, head_reduction=HeadReduction.ALL_MEAN
    )


def test_hae_statistics() -> None:
    sums, maxima = score_text_rows(Statistic.SUM), score_text_rows(Statistic.MAX)
    assert sums[0, 0, 1:6].tolist() == pytest.approx([0.05, 0.12, 0.03, 0.15, 0.19])
    assert maxima[0, 0, 1:6].tolist() == pytest.approx([0.03, 0.10, 0.02, 0.10, 0.11])


@pytest.mark.parametrize(("ratio", "alpha", "max_evicted", "kept"), HAE_DECISIONS)
def test_hae_decisions(
    ratio: float, alpha: float, max_evicted: int | None, kept: list[int]
) -> None:
    sums, maxima = score_text_rows(Statistic.SUM), score_text_rows(Statistic.MAX)
    kept_indices, kept_lens = reference.select_threshold(
        sums.float(),
        maxima.float(),
        HAE_CANDIDATES,
        ratio=ratio,
        alpha=alpha,
        max_evicted=max_evicted,
    )
    assert kept_indices[0, 0, : int(kept_lens)].tolist() == kept


def test_mixkv() -> None:
    similarity, redundancy = reference.key_diversity(KEY)
    assert similarity[0, 0, :6].tolist() == pytest.approx([0.79, 0.82, 0.79, 0.50, 0.22, 0.65])
    assert float(redundancy) == pytest.approx(0.62571, abs=5e-6)

    votes = torch.full((1, 2), 0.5)
    scores = reference.score_keys(WINDOW_QUERY, KEY, row_weight=votes)
    pooled = pool_scores(scores, PRIORITY[:, None], 3)
    value_norm = VALUE.norm(dim=-1).view(1, 1, 8)
    mean = pooled[0, 0, :6].mean()
    diversity = scale_to(mean, -similarity[0, 0, :6])
    value = scale_to(mean, value_norm[0, 0, :6].double())
    expected = [0.01787, 0, 0.01787, 0.19064, 0.35745, 0.10128]
    assert diversity.tolist() == pytest.approx(expected, abs=5e-6)
    assert value.tolist() == pytest.approx([0, 0.09787, 0.19575, 0, 0.09787, 0.29362], abs=5e-6)

    mixed = reference.mix_scores(pooled, similarity, value_norm, redundancy, priority=PRIORITY)
    expected = [0.04882, 0.09326, 0.13804, 0.16355, 0.30043, 0.19744]
    assert mixed[0, 0, :6].tolist() == pytest.approx(expected, abs=5e-6)
    assert torch.equal(mixed[..., 6:], pooled[..., 6:])
    kept_indices, _ = reference.select_topk(mixed, 5, priority=PRIORITY)
    assert kept_indices.tolist() == [[[3, 4, 5, 6, 7]]]


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
