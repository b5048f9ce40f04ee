"""What the structure tests read: the files of the checkout and their code."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@cache
def files() -> tuple[str, ...]:
    """Return the paths of all files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the structure tests need git and a checkout")
    return tuple(sorted(p for p in finished.stdout.splitlines() if (ROOT / p).is_file()))


def read(path: str) -> str:
    return (ROOT / path).read_text()


def ops() -> list[str]:
    """Return the stem of every op, e.g. compact_kv."""
    return sorted({path.split("/")[2] for path in files() if path.startswith("csrc/ops/")})


def cpp_includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def cpp_code(text: str) -> str:
    """Return C++ without comments, strings and include lines."""
    text = re.sub(r"^\s*#\s*include.*$", "", text, flags=re.MULTILINE)
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, " ", text, flags=re.DOTALL)


def python_imports(text: str) -> list[str]:
    """Return the absolute names that a module imports, inside functions too.

    `from a import b` gives a.b: b may be a module.
    """
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


def python_attributes(text: str) -> list[str]:
    """Return every attribute access as far as it is a chain of names: `torch.ops.x`, `.gather`."""

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return node.id if isinstance(node, ast.Name) else ""

    return [dotted(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)]
