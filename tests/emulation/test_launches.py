"""What products cost a GPU: how many kernels, and how often tokens are multiplied."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kvevict import reference
from kvevict.ops.enums import HeadReduction, Statistic
from tests.support.backends import EMULATED
from tests.support.checks import Arguments
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


@pytest.mark.parametrize("op", ["score_keys", "attention_lse"])
def test_decoding_multiplies_every_key_once(emulator: ModuleType, op: str) -> None:
    counters = counters_of(emulator, op, arguments_of(DECODE))
    key_tiles = -(-DECODE.kv_len // 16)
    steps = DECODE.head_dim // 16
    assert counters["launches"] == 2
    assert counters["mmas"] == DECODE.batch_size * DECODE.num_kv_heads * key_tiles * steps


@pytest.mark.parametrize("dim", [64, 256])
def test_groups_meet_only_their_own_targets(emulator: ModuleType, dim: int) -> None:
    """Two of 8 groups are in a tile of 128 sources, and two tiles of 64 targets."""
    places = torch.arange(1024, dtype=torch.int32)
    arguments = {
        "tokens": torch.randn(1, 1, 1024, dim, dtype=torch.bfloat16),
        "source_index": places[None, None, :512],
        "target_index": places[None, None, 512:],
    }
    without = counters_of(emulator, "match_tokens", arguments)
    groups = (places[:512] // 64)[None, None]
    arguments |= {"source_group": groups, "target_group": groups}
    with_groups = counters_of(emulator, "match_tokens", arguments)
    assert without["launches"] == with_groups["launches"] == 3
    assert without["mmas"] == (512 // 16) * (512 // 8) * (dim // 16)
    assert with_groups["mmas"] * 4 == without["mmas"]
