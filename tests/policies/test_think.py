"""ThinK: the channels that it keeps, its hosts, and its fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvevict.policies import (
    H2O,
    HAE,
    TOVA,
    ChannelPolicy,
    KeepAll,
    LightKV,
    LookM,
    PrefillPolicy,
    Prompt,
    SharingPolicy,
    SnapKV,
    ThinK,
    evict_prompt,
    get,
)
from tests.policies.cases import (
    NUM_KV_HEADS,
    NUM_QO_HEADS,
    PROMPTS,
    make_layers,
    make_prompt,
    one_sequence,
)
from tests.policies.oracles import Sequence, think_channels

# Channels


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.0, [0, 1, 2, 3]), (0.4, [0, 2, 3]), (0.5, [0, 2]), (0.8, [2])]
)
def test_worked_example(ratio: float, kept: list[int]) -> None:
    """Means of q² 1.5, 2, .5, 1 (the first row has no vote) and of k² 8/3, 1, 12, 3: 4, 2, 6, 3."""
    first = [9.0, 0.0, 0.0, 9.0]
    query = torch.tensor(
        [
            [first, [1.0, 2.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]],
            [first, [0.0, 2.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0]],
        ]
    )
    key = torch.tensor([[[2.0, 1.0, 4.0, 0.0], [0.0, 1.0, 4.0, 3.0], [2.0, 1.0, 2.0, 0.0]]])
    policy = ThinK(ratio=ratio, window=2)
    channels = policy.channels(query[None], key[None], make_prompt("ttt"))
    assert channels.dtype == torch.int32
    assert channels.tolist() == [[kept]]


@pytest.mark.parametrize("fields", [{}, {"ratio": 0.6, "window": 3}, {"ratio": 0.99}], ids=str)
@pytest.mark.parametrize("prompt_name", PROMPTS)
def test_channels_equal_the_oracle(prompt_name: str, fields: dict[str, Any]) -> None:
    """Padding has no part, though it is large here."""
    rows = PROMPTS[prompt_name]
    prompt = make_prompt(*rows)
    layers = make_layers(prompt)
    for tensors in (layers["queries"], layers["keys"]):
        for tensor in tensors:
            tensor *= 1 + torch.rand(tensor.shape[1], 1, tensor.shape[3])
            tensor.masked_fill_(~prompt.valid[:, None, :, None], torch.nan)
    policy = ThinK(**fields)
    pairs = zip(layers["queries"], layers["keys"], strict=True)
    actual = [policy.channels(query, key, prompt) for query, key in pairs]
    for b, row in enumerate(rows):
        alone = one_sequence(layers, b, row)
        sequence = Sequence(row.replace(".", ""), *([t[0] for t in ts] for ts in alone.values()))
        assert [layer[b].tolist() for layer in actual] == think_channels(policy, sequence)


def test_equal_scores_keep_the_first_channels() -> None:
    prompt = make_prompt("ttt")
    query, key = torch.zeros(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    assert ThinK(ratio=0.5).channels(query, key, prompt).tolist() == [[[0, 1, 2, 3]] * 2]


def test_rows_of_a_later_turn_and_padding_behind() -> None:
    """The rows are the last ones of a longer, partly empty list of keys."""
    prompt = replace(make_prompt("ttiiiiii..tttt.."), qo_len=8, total_lens=torch.tensor([30]))
    (query,), (key,), _ = make_layers(prompt, num_layers=1, qo_len=8).values()
    alone = key[:, :, [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13]]
    for window, rows in ((3, [3, 4, 5]), (32, [2, 3, 4, 5])):
        policy = ThinK(window=window)
        actual = policy.channels(query, key, prompt)
        whole = replace(make_prompt("t" * 12), qo_len=len(rows))
        expected = policy.channels(query[:, :, rows], alone, whole)
        assert torch.equal(actual, expected)


def test_empty_batch_and_empty_prompt() -> None:
    for shape in ((0, 5), (2, 0)):
        prompt = Prompt(torch.zeros(shape, dtype=torch.int8))
        (query,), (key,), _ = make_layers(prompt, num_layers=1).values()
        channels = ThinK().channels(query, key, prompt)
        assert channels.tolist() == [[list(range(5))] * NUM_KV_HEADS] * shape[0]


def test_nothing_is_read_back() -> None:
    with torch.device("meta"):
        mask = torch.ones(2, 26, dtype=torch.bool)
        prompt = Prompt(torch.zeros(2, 26, dtype=torch.int8), mask)
        query, key = torch.zeros(2, NUM_QO_HEADS, 26, 8), torch.zeros(2, NUM_KV_HEADS, 26, 8)
    channels = ThinK().channels(query, key, prompt)
    assert channels.is_meta
    assert channels.shape == (2, NUM_KV_HEADS, 5)


# Hosts


def test_a_host_keeps_what_it_keeps_alone() -> None:
    prompt = make_prompt(*PROMPTS["left_padded"])
    layers = make_layers(prompt)
    for host in (SnapKV(keep=0.4, window=4), TOVA(keep=7), HAE(kappa=0.9, decode="append")):
        ours = evict_prompt(ThinK(host), prompt=prompt, **layers)[2]
        theirs = evict_prompt(host, prompt=prompt, **layers)[2]
        assert ours is not None
        assert theirs is not None
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.kept_indices, other.kept_indices)
            assert torch.equal(one.kept_lens, other.kept_lens)


def test_without_a_host_every_token_stays() -> None:
    prompt = make_prompt(*PROMPTS["left_padded"])
    assert evict_prompt(ThinK(), prompt=prompt, **make_layers(prompt))[2] is None
    assert ThinK().host == KeepAll()


def test_protocols() -> None:
    for policy in (ThinK(), ThinK(SnapKV(keep=8))):
        assert isinstance(policy, PrefillPolicy)
        assert isinstance(policy, ChannelPolicy)
        assert isinstance(policy, SharingPolicy)
    assert not isinstance(SnapKV(keep=8), ChannelPolicy)


def test_by_name() -> None:
    assert get("think") == get("think", keep=None) == ThinK()
    assert get("think", ratio=0.3) == ThinK(ratio=0.3)
    assert get("think", keep=64, window=8) == ThinK(SnapKV(keep=64), window=8)
    assert get("think", host="tova", keep=0.2, num_sink=1) == ThinK(TOVA(keep=0.2, num_sink=1))
    assert get("think", host=TOVA(keep=3), num_recent=5) == ThinK(TOVA(keep=3), num_recent=5)
    assert get("think", host="corm").host == get("corm")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThinK(ratio=1.0), r"ThinK: ratio must be in \[0, 1\), got 1.0"),
        (lambda: ThinK(ratio=-0.1), r"ratio must be in \[0, 1\)"),
        (lambda: ThinK(ratio=True), r"ratio must be in \[0, 1\)"),
        (lambda: ThinK(window=0), "window must be an int of at least 1, got 0"),
        (lambda: ThinK(num_recent=-1), "num_recent must be an int of at least 0, got -1"),
        (lambda: ThinK(num_recent=0.5), "num_recent must be an int"),  # type: ignore[arg-type]
        (lambda: ThinK(LightKV()), "host must be a PrefillPolicy that leaves channels alone"),  # type: ignore[arg-type]
        (lambda: ThinK(ThinK()), "host must be a PrefillPolicy that leaves channels alone"),
        (lambda: ThinK(H2O(keep=0.5)), "host must not evict while decoding"),
        (lambda: get("think", host="h2o", keep=9), "host must not evict while decoding"),
        (
            lambda: ThinK(HAE(drop_hidden=True, decode="append")),
            "host must not drop rows between layers",
        ),
        (lambda: ThinK(LookM(keep=9)), "host must not merge"),
        (lambda: get("think", host="look_m", keep=9), "host of think must be one of"),
        (lambda: get("think", host="lightkv"), "host of think must be one of"),
        (lambda: get("think", host="think"), "host of think must be one of"),
        (lambda: get("think", host="x", keep=9), "host of think must be one of"),
        (lambda: get("think", host=TOVA(keep=3), keep=9), "host of think has its own fields"),
    ],
)
def test_refused_fields(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
