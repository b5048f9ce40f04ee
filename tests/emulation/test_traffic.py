"""Kernels copy every byte as often as they should, and none in vain."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.support.backends import EMULATED
from tests.support.moving import make_caches
from tests.support.samples import Arguments


def copied_bytes(emulator: ModuleType, op: str, arguments: Arguments) -> int:
    """Return how many bytes asynchronous copies brought."""
    emulator.reset_counters()
    EMULATED.op(op)(**arguments)
    count: int = emulator.counters()["copied_bytes"]
    return count


def test_gather_kv_copies_every_row_once(emulator: ModuleType) -> None:
    """Rows so wide that a block's part of them, 6 vectors, does not divide its 128 threads."""
    keys, values = make_caches("cpu", num_layers=1, batch_size=1, kv_len=25, head_dim=3 * 1024)
    kept = torch.arange(1, 24, dtype=torch.int32).expand(1, 3, -1)
    arguments = {"keys": keys, "values": values, "kept_indices": kept}
    num_rows = 2 * 3 * 23
    assert copied_bytes(emulator, "gather_kv", arguments) == num_rows * 3 * 1024 * 4


def test_compact_kv_copies_only_rows_that_move(emulator: ModuleType) -> None:
    keys, values = make_caches("cpu", num_layers=1, batch_size=1, head_dim=64)
    kept = torch.tensor([*range(10), 12, 30, 44], dtype=torch.int32).expand(1, 3, -1)
    arguments = {"keys": keys, "values": values, "kept_indices": kept}
    num_rows = 2 * 3 * 3
    assert copied_bytes(emulator, "compact_kv_", arguments) == num_rows * 64 * 4


@pytest.mark.parametrize(("dim", "tiles_per_source"), [(64, 1), (256, 8)])
@pytest.mark.parametrize("with_groups", [False, True])
def test_match_tokens_copies_only_targets_of_its_groups(
    emulator: ModuleType, dim: int, tiles_per_source: int, with_groups: bool
) -> None:
    """Two of 8 groups are in a tile of 128 sources, and two tiles of 64 targets.

    Long sources come with every tile of targets again.
    """
    places = torch.arange(1024, dtype=torch.int32)
    arguments: Arguments = {
        "tokens": torch.randn(1, 1, 1024, dim, dtype=torch.bfloat16),
        "source_index": places[None, None, :512],
        "target_index": places[None, None, 512:],
    }
    num_tiles = 8
    if with_groups:
        groups = (places[:512] // 64)[None, None]
        arguments |= {"source_group": groups, "target_group": groups}
        num_tiles, tiles_per_source = 2, min(tiles_per_source, 2)
    num_rows = 4 * (tiles_per_source * 128 + num_tiles * 64)
    assert copied_bytes(emulator, "match_tokens", arguments) == num_rows * dim * 2
