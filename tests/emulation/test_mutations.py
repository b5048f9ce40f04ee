"""The table of mutations fits the sources."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.emulation.mutate import row_start, table
from tests.emulation.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.kernel}: {m.what}")
def test_text_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.text) == 1
    assert mutation.replacement != mutation.text


def test_every_kernel_is_broken_in_three_ways() -> None:
    assert min(Counter(mutation.kernel for mutation in MUTATIONS).values()) >= 3


def test_readme_has_every_mutation() -> None:
    rows = table()
    starts = [row_start(mutation) for mutation in MUTATIONS]
    assert [start for start in starts if not any(row.startswith(start) for row in rows)] == []
    assert [row for row in rows if "**nothing**" in row] == []
