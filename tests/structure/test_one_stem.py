"""One stem per op: X leads to csrc/ops/X, kvevict/ops/X.py, tests/ops/test_X.py and so on."""

from __future__ import annotations

import re
from collections.abc import Collection

import pytest
import torch

import kvevict.ops
from kvevict import reference
from tests.structure.tree import files, ops, read
from tests.support.backends import OPS

OP_FILES = ("{op}.h", "{op}_cpu.cpp", "{op}_torch.cpp", "{op}_cuda.cu")
OPTIONAL = ("csrc/ops/{op}/{op}_cuda.cu",)
PLACES = (
    *(f"csrc/ops/{{op}}/{name}" for name in OP_FILES),
    "kvevict/ops/{op}.py",
    "kvevict/reference/{op}.py",
    "tests/ops/test_{op}.py",
    "bench/ops/bench_{op}.py",
)
# Folders where every file is a file of some op; names with _ in front are shared by all ops.
OP_FOLDERS = ("csrc/ops/", "kvevict/ops/", "kvevict/reference/", "bench/ops/")
SHARED = ("kvevict/ops/enums.py",)


def missing(op: str, paths: Collection[str], cmake: str, readme: str) -> list[str]:
    """Return the places where an op is not mentioned."""
    wanted = [place.format(op=op) for place in PLACES if place not in OPTIONAL]
    absent = [path for path in wanted if path not in paths]
    if f"kvevict_add_op({op})\n" not in cmake:
        absent.append(f"CMakeLists.txt: kvevict_add_op({op})")
    if not re.search(rf"^\|.*`{op}_?`", readme, re.MULTILINE):
        absent.append(f"README.md: a row of the table of ops for `{op}`")
    return absent


def strays(stems: Collection[str], paths: Collection[str], cmake: str) -> list[str]:
    """Return the files and build lines that look like an op's and belong to none."""
    known = {place.format(op=op) for place in PLACES for op in stems} | set(SHARED)
    in_folders = [p for p in paths if p.startswith(OP_FOLDERS) and "/_" not in p]
    files_of_none = [path for path in in_folders if path not in known]
    added = re.findall(r"^kvevict_add_op\((\w+)\)", cmake, re.MULTILINE)
    return files_of_none + [f"kvevict_add_op({op})" for op in added if op not in stems]


@pytest.mark.parametrize("op", ops())
def test_an_op_is_everywhere(op: str) -> None:
    assert missing(op, files(), read("CMakeLists.txt"), read("README.md")) == []


def test_every_list_of_ops_is_named_in_the_readme() -> None:
    """Files that name the template op, other than its own and those of tests."""
    own = {place.format(op="null") for place in PLACES}
    lists = {
        path
        for path in files()
        if path.startswith(("kvevict/", "tests/")) and path.endswith(".py") and path not in own
        if "/test_" not in path and re.search(r'"null(_kernel)?"', read(path))
    }
    _, section = read("README.md").split("## Adding an op")
    assert {path for path in lists if f"`{path}`" not in section} == set()
    assert len(lists) >= 6


def test_nothing_belongs_to_no_op() -> None:
    assert strays(ops(), files(), read("CMakeLists.txt")) == []


def test_the_template_op_has_every_optional_file_too() -> None:
    assert {place.format(op="null") for place in PLACES} <= set(files())


def test_the_registered_ops_are_the_folders() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    names = {n.removeprefix("kvevict::") for n in registered if n.startswith("kvevict::")}
    assert sorted(name.removesuffix("_") for name in names) == ops()
    assert names == set(OPS) == set(reference.__all__)
    assert names == {name for name in kvevict.ops.__all__ if name.islower()}


def test_a_missing_or_stray_file_is_found() -> None:
    places = [place.format(op="mix") for place in PLACES]
    cmake, readme = "kvevict_add_op(mix)\n", "| `mix_` | mixes |\n"
    optional = "csrc/ops/mix/mix_cuda.cu"
    for path in places:
        rest = [p for p in places if p != path]
        assert missing("mix", rest, cmake, readme) == ([] if path == optional else [path])
    assert missing("mix", places, "kvevict_add_op(mix_scores)\n", readme)
    assert missing("mix", places, cmake, "`mix` is mentioned, but has no row")
    assert strays(["mix"], places, cmake) == []
    assert strays([], places, "") == [p for p in places if not p.startswith("tests/")]
    assert strays(["mix"], [*places, "csrc/ops/mix/mix_metal.mm"], cmake)
    assert strays(["mix"], places, "kvevict_add_op(mix)\nkvevict_add_op(gone)\n")
