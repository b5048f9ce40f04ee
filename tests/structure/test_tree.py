"""What the repository contains: nothing generated, nothing half done, nothing at a wrong place."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest

from tests.structure.tree import ROOT, files

TOP_LEVEL = {
    *("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py"),
    *("CMakeLists.txt", ".ci", ".gitignore", ".clang-format"),
    *("csrc", "kvevict", "tests", "bench", "third_party"),
}
SPDX = "// SPDX-License-Identifier: Apache-2.0\n"
# The brackets keep this file from finding itself.
UNFINISHED = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X]|NotImplementedErro[r])\b")
MAX_BYTES = 500_000
CHECKPOINTS = "bench/fidelity/checkpoints/*/*"
MAX_CHECKPOINT_BYTES = 2_000_000
# Where data and binary files may be.
DATA = ("bench/results/*.json", "bench/fidelity/results/*.json", f"{CHECKPOINTS}.json")
BINARY = ("bench/figures/*.png", f"{CHECKPOINTS}.safetensors")


def violations(path: str, content: bytes) -> list[str]:
    name = PurePosixPath(path)
    found = []
    if name.parts[0] not in TOP_LEVEL:
        found.append("is not part of the layout")
    if name.suffix == ".json" and not any(map(name.match, DATA)):
        found.append("data belongs to bench/results")
    max_bytes = MAX_CHECKPOINT_BYTES if name.match(f"{CHECKPOINTS}.safetensors") else MAX_BYTES
    if len(content) > max_bytes:
        found.append(f"has more than {max_bytes} bytes")
    if b"\0" in content:
        if not any(map(name.match, BINARY)):
            found.append("is binary, and neither a picture in bench/figures nor a checkpoint")
        return [f"{path} {what}" for what in found]
    text = content.decode()
    if name.suffix in {".cpp", ".h", ".cu", ".cuh"} and not text.startswith(SPDX):
        found.append("does not start with the SPDX line")
    found += [f"contains {word}" for word in UNFINISHED.findall(text)]
    if text and not text.endswith("\n"):
        found.append("does not end with a newline")
    return [f"{path} {what}" for what in found]


def test_tree() -> None:
    assert [line for path in files() for line in violations(path, (ROOT / path).read_bytes())] == []


def test_every_top_level_file_is_there() -> None:
    present = {path.split("/")[0] for path in files()}
    assert present >= TOP_LEVEL


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("notes.txt", b"n\n"),
        ("build/libkvevict.so", b"\x7fELF\0"),
        ("csrc/picture.png", b"\x89PNG\0"),
        ("kvevict/state.json", b"{}\n"),
        ("csrc/core/order.h", b"#pragma once\n"),
        ("kvevict/demo.py", b"# %b\n" % b"todo".upper()),
        ("kvevict/demo.py", b"raise Not%b\n" % b"ImplementedError"),
        ("kvevict/demo.py", b"x = 1"),
        ("bench/large.txt", b"x" * MAX_BYTES + b"\n"),
        ("bench/fidelity/h-0/model.safetensors", b"\0"),
        ("bench/fidelity/checkpoints/h-0/large.safetensors", b"\0" * (MAX_CHECKPOINT_BYTES + 1)),
        ("bench/fidelity/checkpoints/h-0/training.pt", b"\0"),
    ],
)
def test_a_violation_is_found(path: str, content: bytes) -> None:
    assert violations(path, content)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("bench/figures/kept.png", b"\x89PNG\0"),
        ("bench/fidelity/checkpoints/h-0/model.safetensors", b"\0" * MAX_CHECKPOINT_BYTES),
        ("bench/fidelity/checkpoints/h-0/config.json", b"{}\n"),
    ],
)
def test_a_file_in_its_place_is_not_blamed(path: str, content: bytes) -> None:
    assert violations(path, content) == []
