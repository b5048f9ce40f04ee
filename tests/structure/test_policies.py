"""A policy is a module of its name, a row of the README and a case of the tests."""

from __future__ import annotations

import re

import pytest

from kvevict import policies
from tests.structure.tree import files, read


@pytest.mark.parametrize("name", policies.list())
def test_a_policy_is_everywhere(name: str) -> None:
    assert f"kvevict/policies/{name}.py" in files()
    assert re.search(rf"^\| `{name}` \|", read("README.md"), re.MULTILINE)
    if name in policies.list(with_keep=True):
        assert f'"{name}"' in read("tests/policies/cases.py")
        assert f'"{name}"' in read("tests/policies/oracles.py")
    else:
        assert f"tests/policies/test_{name}.py" in files()
