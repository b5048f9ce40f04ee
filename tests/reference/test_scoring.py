"""The scoring oracles against one row, one head and one key at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvevict import reference
from kvevict.ops.enums import HeadReduction, Statistic
from tests.reference.naive import attention_row

BATCH_SIZE, NUM_QO_HEADS, NUM_KV_HEADS, QO_LEN, KV_LEN, HEAD_DIM = 2, 4, 2, 5, 7, 8


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH_SIZE, NUM_QO_HEADS, QO_LEN, HEAD_DIM, generator=generator)
    key = torch.randn(BATCH_SIZE, NUM_KV_HEADS, KV_LEN, HEAD_DIM, generator=generator)
    key_mask = torch.ones(BATCH_SIZE, KV_LEN, dtype=torch.bool)
    key_mask[1, :4] = False
    return query, key, key_mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_lse(causal: bool, masked: bool) -> None:
    query, key, key_mask = make_inputs()
    mask = key_mask if masked else None
    expected = torch.empty(BATCH_SIZE, NUM_QO_HEADS, QO_LEN, dtype=torch.float64)
    for b, h, row in itertools.product(range(BATCH_SIZE), range(NUM_QO_HEADS), range(QO_LEN)):
        _, expected[b, h, row] = attention_row(
            query, key, b, h, row, key_mask=mask, sm_scale=0.3, causal=causal
        )
    actual = reference.attention_lse(query, key, key_mask=mask, sm_scale=0.3, causal=causal)
    torch.testing.assert_close(actual, expected)
    assert torch.isneginf(actual).any() == (masked and causal)


def naive_score(per_head: list[list[Tensor]], statistic: int, head_reduction: int) -> Tensor:
    """Reduce weighted rows per_head[head][vote], each [kv_len], to scores [num_heads, kv_len]."""
    zero = torch.zeros(KV_LEN, dtype=torch.float64)

    def over_rows(rows: list[Tensor]) -> Tensor:
        total = zero
        for row in rows:
            if statistic == Statistic.MAX:
                total = torch.maximum(total, row)
            else:
                total = total + (row**2 if statistic == Statistic.SUM_OF_SQUARES else row)
        return total

    def over_heads(heads: list[list[Tensor]]) -> Tensor:
        if head_reduction == HeadReduction.GROUP_MAX:
            return torch.stack([over_rows(rows) for rows in heads]).max(0).values
        if statistic == Statistic.MAX:
            return over_rows([sum(rows, zero) / len(heads) for rows in zip(*heads, strict=True)])
        return sum((over_rows(rows) for rows in heads), zero) / len(heads)

    sizes = {
        HeadReduction.NONE: 1,
        HeadReduction.GROUP_MEAN: NUM_QO_HEADS // NUM_KV_HEADS,
        HeadReduction.GROUP_MAX: NUM_QO_HEADS // NUM_KV_HEADS,
        HeadReduction.ALL_MEAN: NUM_QO_HEADS,
    }
    size = sizes[HeadReduction(head_reduction)]
    groups = [per_head[h : h + size] for h in range(0, NUM_QO_HEADS, size)]
    return torch.stack([over_heads(group) for group in groups])


@pytest.mark.parametrize("head_reduction", list(HeadReduction))
@pytest.mark.parametrize("statistic", list(Statistic))
@pytest.mark.parametrize("weight_dim", [None, 2, 3])
def test_score_keys(statistic: int, head_reduction: int, weight_dim: int | None) -> None:
    query, key, key_mask = make_inputs()
    row_index = torch.tensor([[4, 0, 4, -1], [-1, 2, 1, 3]], dtype=torch.int32)
    per_head_weight = torch.rand(BATCH_SIZE, NUM_QO_HEADS, 4)
    if weight_dim == 2:
        per_head_weight[:] = per_head_weight[:, :1].clone()
    row_weight = {None: None, 2: per_head_weight[:, 0], 3: per_head_weight}[weight_dim]

    expected = []
    for b in range(BATCH_SIZE):
        per_head: list[list[Tensor]] = [[] for _ in range(NUM_QO_HEADS)]
        for h, r in itertools.product(range(NUM_QO_HEADS), range(4)):
            if row_index[b, r] < 0:
                continue
            row, _ = attention_row(query, key, b, h, int(row_index[b, r]), key_mask=key_mask)
            weight = 1.0 if row_weight is None else per_head_weight[b, h, r].double()
            per_head[h].append(weight * row)
        expected.append(naive_score(per_head, statistic, head_reduction))

    actual = reference.score_keys(
        query,
        key,
        row_index=row_index,
        row_weight=row_weight,
        key_mask=key_mask,
        statistic=statistic,
        head_reduction=head_reduction,
    )
    torch.testing.assert_close(actual, torch.stack(expected))


def test_score_keys_of_all_rows_sums_to_the_number_of_voting_rows() -> None:
    query, key, key_mask = make_inputs()
    scores = reference.score_keys(query, key, key_mask=key_mask, head_reduction=HeadReduction.NONE)
    voting = key_mask[:, KV_LEN - QO_LEN :].sum(1)
    torch.testing.assert_close(scores.sum(-1), voting[:, None].expand(-1, NUM_QO_HEADS).double())
    assert (scores[~key_mask[:, None].expand_as(scores)] == 0).all()


def test_a_given_lse_is_used_and_minus_infinity_silences_the_row() -> None:
    query, key, _ = make_inputs()
    lse = reference.attention_lse(query, key)
    shifted = reference.score_keys(query, key, softmax_lse=(lse - 1).float())
    torch.testing.assert_close(
        shifted, torch.e * reference.score_keys(query, key), rtol=1e-6, atol=0
    )
    lse[:, :, 1:] = -torch.inf
    only_first = torch.zeros(BATCH_SIZE, 1, dtype=torch.int32)
    torch.testing.assert_close(
        reference.score_keys(query, key, softmax_lse=lse),
        reference.score_keys(query, key, row_index=only_first),
    )


def test_no_voting_row_scores_zero() -> None:
    query, key, _ = make_inputs()
    nobody = torch.full((BATCH_SIZE, 3), -1, dtype=torch.int32)
    for statistic, empty in itertools.product(Statistic, [nobody, nobody[:, :0]]):
        scores = reference.score_keys(query, key, row_index=empty, statistic=statistic)
        assert scores.shape == (BATCH_SIZE, NUM_KV_HEADS, KV_LEN)
        assert (scores == 0).all()


def test_score_keys_by_text() -> None:
    query, key, key_mask = make_inputs()
    row_index = torch.tensor([[4, 0, 4, -1], [-1, 2, 1, 3]], dtype=torch.int32)
    expected_scores = torch.zeros(BATCH_SIZE, 1, KV_LEN, dtype=torch.float64)
    expected_sums = torch.zeros_like(expected_scores)
    expected_weights = torch.zeros(BATCH_SIZE, 4, dtype=torch.float64)
    for b in range(BATCH_SIZE):
        # Entry of row_index -> (position of its key, attention averaged over the heads).
        text: dict[int, tuple[int, Tensor]] = {}
        for r in range(4):
            row = int(row_index[b, r])
            position = KV_LEN - QO_LEN + row
            if row < 0 or not key_mask[b, position]:
                continue
            heads = [
                attention_row(query, key, b, h, row, key_mask=key_mask)[0]
                for h in range(NUM_QO_HEADS)
            ]
            text[r] = position, torch.stack(heads).mean(0)
        for r, (position, abar) in text.items():
            received = [other[position] for at, other in text.values() if at >= position]
            expected_weights[b, r] = sum(received) / len(received)
            expected_scores[b, 0] += expected_weights[b, r] * abar
            expected_sums[b, 0] += abar

    actual = reference.score_keys_by_text(query, key, row_index, key_mask=key_mask)
    torch.testing.assert_close(actual, (expected_scores, expected_sums, expected_weights))
    assert actual[2][1].count_nonzero() == 2  # row 1 of sequence 1 stands at a masked key


def test_padding_may_hold_anything() -> None:
    query, key, key_mask = make_inputs()
    row_index = torch.arange(QO_LEN, dtype=torch.int32).expand(BATCH_SIZE, -1)

    def compute() -> tuple[Tensor, ...]:
        return (
            reference.attention_lse(query, key, key_mask=key_mask),
            reference.score_keys(query, key, key_mask=key_mask),
            *reference.score_keys_by_text(query, key, row_index, key_mask=key_mask),
        )

    clean = compute()
    key.masked_fill_(~key_mask[:, None, :, None], torch.nan)
    query.masked_fill_(~key_mask[:, None, KV_LEN - QO_LEN :, None], torch.inf)
    torch.testing.assert_close(compute(), clean, rtol=0, atol=0)
