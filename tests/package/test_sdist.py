"""The source distribution: what it contains is enough to build."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path, PurePosixPath

import pytest

from tests.package.support import ROOT, run
from tests.structure.tree import files

BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
FILES = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
GENERATED = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked source distribution of a checkout in which the library was built."""
    checkout, folder = (tmp_path_factory.mktemp(name) for name in ("checkout", "sdist"))
    for path in files():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    library = checkout / "kvevict" / "lib" / "libkvevict.so"
    library.parent.mkdir()
    library.touch()
    run([sys.executable, "-c", BUILD, folder], cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    # Not by tarfile: what it may be told about safety differs between Pythons.
    run(["tar", "-xzf", archive, "-C", folder], cwd=checkout)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def test_contents(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith("kvevict.egg-info/")}
    folders = ("csrc", "kvevict", "third_party")
    expected = {path for path in files() if PurePosixPath(path).parts[0] in folders}
    assert names == expected | FILES | GENERATED


def test_it_can_be_configured(sdist: Path) -> None:
    """CMake looks for every source file that it was told of."""
    if shutil.which("g++") is None:
        pytest.skip("configuring needs g++")
    options = ["-G", "Ninja", "-DKVEVICT_CUDA=OFF", f"-DPython3_EXECUTABLE={sys.executable}"]
    run(["cmake", "-S", sdist, "-B", sdist / "build", *options])
