"""What happens at import, and what build_info() tells."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import kvevict
from tests.package.support import ROOT, run


def test_build_info() -> None:
    info = kvevict.build_info()
    assert list(info) == [
        *("version", "built_with_torch", "cpu_isa_built", "cpu_isa_supported", "cpu_isa"),
        *("cuda_version", "cuda_archs", "no_cuda_reason"),
    ]
    assert info["version"] == kvevict.__version__
    assert info["cpu_isa_built"] == ["baseline", "avx2", "avx512", "avx512_bf16"]
    assert set(info["cpu_isa_supported"]) <= set(info["cpu_isa_built"])
    assert info["cpu_isa"] in info["cpu_isa_supported"]
    if info["cuda_version"]:
        assert info["cuda_archs"] and info["no_cuda_reason"] is None
    else:
        assert info["cuda_archs"] == [] and info["no_cuda_reason"]


def test_the_version_is_that_of_pyproject() -> None:
    line = f'version = "{kvevict.__version__}"'
    assert line in (ROOT / "pyproject.toml").read_text().splitlines()


def test_import_does_not_import_frameworks() -> None:
    code = "import sys, kvevict; print({'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    after_torch = (
        "import sys, torch; print({'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    assert run([sys.executable, "-c", code]) == run([sys.executable, "-c", after_torch])


def test_a_package_without_library_says_how_to_build_it(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "kvevict", tmp_path / "kvevict", ignore=ignored)
    error = run([sys.executable, "-c", "import kvevict"], cwd=tmp_path, ok=False)
    assert "kvevict._library.LibraryNotBuiltError" in error
    assert f"{tmp_path}/kvevict/lib/libkvevict.so does not exist" in error
    assert "pip install --no-build-isolation --use-pep517 -e ." in error


def test_an_unknown_isa_is_refused() -> None:
    error = run([sys.executable, "-c", "import kvevict"], ok=False, KVEVICT_CPU_ISA="sse9")
    supported = ", ".join(kvevict.build_info()["cpu_isa_supported"])
    assert f"ValueError: KVEVICT_CPU_ISA must be one of {supported}, got sse9" in error
