"""What ops cost a GPU: how many kernels, and how often the keys are multiplied."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kvevict import reference
from kvevict.ops.enums import HeadReduction, Statistic
from tests.support.backends import EMULATED
from tests.support.checks import Arguments
from tests.support.moving import make_caches
from tests.support.scoring import attention_arguments
from tests.support.shapes import Shape, make_rows

PROMPT = Shape("prompt", 1, 8, 2, 40, 150, 64)
DECODE = Shape("decode", 2, 8, 2, 1, 1000, 128)


def counters_of(emulator: ModuleType, op: str, arguments: Arguments) -> dict[str, int]:
    emulator.reset_counters()
    EMULATED.op(op)(**arguments)
    counters: dict[str, int] = emulator.counters()
    return counters


def arguments_of(shape: Shape, *, given_lse: bool = False) -> Arguments:
    arguments = attention_arguments(shape, "cpu", torch.bfloat16)
    if given_lse:
        lse = reference.attention_lse(arguments["query"], arguments["key"])
        arguments["softmax_lse"] = lse.float()
    return arguments


@pytest.mark.parametrize("statistic", list(Statistic))
@pytest.mark.parametrize("head_reduction", list(HeadReduction))
@pytest.mark.parametrize(("given_lse", "launches"), [(True, 1), (False, 2)])
def test_score_keys(
    emulator: ModuleType, statistic: int, head_reduction: int, given_lse: bool, launches: int
) -> None:
    arguments = arguments_of(PROMPT, given_lse=given_lse)
    arguments |= {"statistic": statistic, "head_reduction": head_reduction}
    assert counters_of(emulator, "score_keys", arguments)["launches"] == launches


@pytest.mark.parametrize(("given_lse", "launches"), [(True, 2), (False, 3)])
def test_score_keys_by_text(emulator: ModuleType, given_lse: bool, launches: int) -> None:
    arguments = arguments_of(PROMPT, given_lse=given_lse)
    arguments["row_index"] = make_rows(1, 11, PROMPT.qo_len)
    assert counters_of(emulator, "score_keys_by_text", arguments)["launches"] == launches


@pytest.mark.parametrize("max_evicted", [None, 10])
def test_select_threshold(emulator: ModuleType, max_evicted: int | None) -> None:
    sums = torch.rand(2, 2, 3000)
    candidates = torch.ones(2, 3000, dtype=torch.bool)
    arguments = {"sums": sums, "maxima": sums, "candidates": candidates, "kappa": 0.9, "alpha": 1.0}
    arguments["max_evicted"] = max_evicted
    assert counters_of(emulator, "select_threshold", arguments)["launches"] == 3


def test_evict_slots_of_all_layers(emulator: ModuleType) -> None:
    keys, values = make_caches("cpu", num_layers=32, batch_size=1, kv_len=9, head_dim=8)
    slots = torch.zeros(32, 1, 3, 1, dtype=torch.int32)
    kv_lens = torch.full((1, 1), 9, dtype=torch.int32)
    arguments = {"keys": keys, "values": values, "slots": slots, "kv_lens": kv_lens}
    assert counters_of(emulator, "evict_slots_", arguments)["launches"] == 1


@pytest.mark.parametrize("op", ["score_keys", "attention_lse"])
def test_decoding_multiplies_every_key_once(emulator: ModuleType, op: str) -> None:
    counters = counters_of(emulator, op, arguments_of(DECODE))
    key_tiles = -(-DECODE.kv_len // 16)
    steps = DECODE.head_dim // 16
    assert counters["launches"] == 2
    assert counters["mmas"] == DECODE.batch_size * DECODE.num_kv_heads * key_tiles * steps
