"""The kernels that move rows copy every byte once, and none in vain."""

from __future__ import annotations

from types import ModuleType

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
