"""The wheel: its tag, its contents, and its life outside the source tree."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import kvevict
from tests.package.support import ROOT, run

SMOKE_TEST = """
import json, sys
import torch
import kvevict

info = kvevict.build_info()
key = torch.randn(2, 4, 40, 64, dtype=torch.bfloat16)
query = torch.randn(2, 8, 40, 64, dtype=torch.bfloat16)
before = key.clone()
scores = kvevict.score_keys(query, key)
kept_indices, kept_lens = kvevict.select_topk(scores, 10)
kvevict.compact_kv_([key], [key.clone()], kept_indices, kept_lens)
expected = before.gather(2, kept_indices.long()[..., None].expand(-1, -1, -1, 64))
assert torch.equal(key[:, :, :10], expected)
assert "transformers" not in sys.modules
print(json.dumps({"file": kvevict.__file__, **info}))
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of this checkout. One CUDA architecture, to be quick."""
    if shutil.which("g++") is None:
        pytest.skip("building the wheel needs g++")
    # With pytest-xdist every worker comes here: the first one builds, in the common folder.
    common = tmp_path_factory.getbasetemp()
    folder = (common.parent if common.name.startswith("popen-") else common) / "wheel"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            for stale in ROOT.glob("build/lib*"):  # setuptools never removes a file from there
                shutil.rmtree(stale)
            build = ["wheel", ".", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder]
            run([sys.executable, "-m", "pip", *build], KVEVICT_CUDA_ARCHS="90-real")
    (path,) = folder.glob("*.whl")
    return path


def test_tag(wheel: Path) -> None:
    assert wheel.name == f"kvevict-{kvevict.__version__}-py3-none-linux_x86_64.whl"


def test_contents(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kvevict").rglob("*.py")}
    assert names == sources | {"kvevict/py.typed", "kvevict/lib/libkvevict.so"}


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.11"]
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_runs_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", environment])
    python = environment / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *install])
    (packages,) = environment.glob("lib/python*/site-packages")
    # No network: torch and what it needs come from the running interpreter, after the wheel.
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    info = json.loads(run([python, "-c", SMOKE_TEST], cwd=elsewhere).splitlines()[-1])
    assert Path(info["file"]).is_relative_to(environment)
    assert info["version"] == kvevict.__version__
    assert info["cuda_archs"] == (["90-real"] if info["cuda_version"] else [])
