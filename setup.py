"""Drives CMake: CMakeLists.txt describes the build, pyproject.toml the package."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds kvevict/lib/libkvevict.so; KVEVICT_* environment variables become CMake options."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        build = ROOT / "build" / ("editable" if in_place else "wheel")
        options = {name: value for name, value in os.environ.items() if name.startswith("KVEVICT_")}
        options["KVEVICT_VERSION"] = self.distribution.get_version()
        subprocess.check_call(
            # -U: options given once do not stick in the cache.
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-U", "KVEVICT_*"]
            + ["-DCMAKE_BUILD_TYPE=Release"]
            + [f"-DPython3_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
            + [f"-D{name}={value}" for name, value in options.items()]
        )
        subprocess.check_call(["cmake", "--build", build])
        subprocess.check_call(["cmake", "--install", build])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class StableWheel(bdist_wheel):
    """The library uses no CPython ABI and only torch's stable one: one wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def native_sources() -> list[str]:
    """Return what CMake reads, for the source distribution."""
    folders = [path for name in ("csrc", "third_party") for path in (ROOT / name).rglob("*")]
    files = sorted(str(path.relative_to(ROOT)) for path in folders if path.is_file())
    return ["CMakeLists.txt", *files]


setup(
    ext_modules=[Extension("kvevict.lib.libkvevict", [], depends=native_sources())],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
