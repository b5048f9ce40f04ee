"""Breaks every kernel in several ways and shows which test notices.

    python -m tests.emulation.mutate [--build build/mutate] [--only text]

Each mutation is compiled beside the other, intact kernels into a library of its own; no file of
the checkout changes but README.md, whose table gets the rows of the mutations that ran.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulation.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- mutations -->\n", "<!-- end of mutations -->\n"
LIBRARY = "libkvevict_emulated.so"
TARGET = "kvevict_emulated"
TESTS_OF_ALL_OPS = ["tests/emulation/test_schedules.py", "tests/emulation/test_traffic.py"]
LIMIT_S = 900


def run(command: list[str], cwd: Path = ROOT) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def build_intact(build: Path, processes: int) -> None:
    """Build the emulation without mutations: its objects are linked to the mutated ones."""
    if not (build / "build.ninja").exists():
        options = ["-DKVEVICT_CUDA=OFF", "-DKVEVICT_EMULATION=ON", "-DCMAKE_BUILD_TYPE=Release"]
        python = f"-DPython3_EXECUTABLE={sys.executable}"
        run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options, python])
    run(["ninja", "-C", str(build), f"-j{processes}", TARGET, "_kvevict_emulator"])


def build_mutated(mutation: Mutation, build: Path, folder: Path) -> Path:
    """Return a library with the mutation."""
    kernels = ROOT / "csrc" / "ops" / mutation.op / f"{mutation.op}_cuda.cu"
    mutated = folder / Path(mutation.file).relative_to("csrc")
    mutated.parent.mkdir(parents=True)
    mutated.write_text(
        (ROOT / mutation.file).read_text().replace(mutation.text, mutation.replacement)
    )
    library, obj = folder / LIBRARY, folder / "mutated.o"

    commands = json.loads((build / "compile_commands.json").read_text())
    command = next(
        shlex.split(c["command"])
        for c in commands
        if c["file"] == str(kernels) and f"{TARGET}_kernels.dir" in c["command"]
    )
    intact = command[command.index("-o") + 1]
    source = str(mutated if mutated.name == kernels.name else kernels)
    compile_command = [argument for argument in command if argument != str(kernels)]
    compile_command[compile_command.index(intact)] = str(obj)
    # A header in the folder comes before the one of the checkout.
    run([*compile_command, "-O1", "-iquote", str(folder), source], build)

    link = run(["ninja", "-C", str(build), "-t", "commands", TARGET]).splitlines()[-1]
    link = link.removeprefix(": && ").removesuffix(" && :")
    arguments = [argument for argument in shlex.split(link) if argument != intact]
    arguments[arguments.index("-o") + 1] = str(library)
    arguments.insert(arguments.index("-o"), str(obj))  # the first of several templates counts
    run(arguments, build)
    return library


def first_failure(arguments: list[str], library: Path | None) -> str | None:
    """Return the first test that fails, or what else goes wrong; None if all pass."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if library is not None:
        environment["KVEVICT_EMULATED_OPS"] = str(library)
    options = ["-x", "-q", "-rf", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=LIMIT_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if failed is None and done.returncode > 0:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return failed[1] if failed else "a crash"


@functools.cache
def fails_intact(test: str) -> bool:
    return first_failure([test], None) is not None


def noticed_by(mutation: Mutation, build: Path) -> str | None:
    """Return what shows a mutation, a test as a rule; None if nothing does."""
    word = "score_keys-" if mutation.op == "score_keys" else mutation.op
    arguments = [f"tests/ops/test_{mutation.op}.py", *TESTS_OF_ALL_OPS]
    arguments += ["-k", f"emulated or (emulation and {word})"]
    with tempfile.TemporaryDirectory() as folder:
        library = build_mutated(mutation, build, Path(folder))
        failed = first_failure(arguments, library)
    if failed and "::" in failed and fails_intact(failed):
        raise RuntimeError(f"{failed} fails without any mutation, too")
    return failed


def row_start(mutation: Mutation) -> str:
    return f"| {mutation.kernel} | {mutation.what} | "


def row_of(mutation: Mutation, test: str | None) -> str:
    if test is None:
        seen = f"equivalent: {mutation.equivalent}" if mutation.equivalent else "**nothing**"
    else:
        seen = f"`{test.split('/')[-1]}`".replace("|", "\\|") if "::" in test else test
    return f"{row_start(mutation)}{seen} |\n"


def table() -> list[str]:
    """Return the rows that README.md has."""
    return README.read_text().split(BEGIN)[1].split(END)[0].splitlines(keepends=True)[2:]


def update_table(row: str) -> None:
    """Write the row of a mutation into README.md, where MUTATIONS has it."""
    rows = [row, *table()]
    starts = [row_start(mutation) for mutation in MUTATIONS]
    ordered = [next((row for row in rows if row.startswith(start)), "") for start in starts]
    before, rest = README.read_text().split(BEGIN)
    head = "| kernel | mistake | noticed by |\n|---|---|---|\n"
    README.write_text(before + BEGIN + head + "".join(ordered) + END + rest.split(END)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutate")
    parser.add_argument("--only", default="", help="mutations of whose kernel this is a part")
    parser.add_argument("-j", type=int, default=2, dest="processes")
    options = parser.parse_args()
    build = options.build.resolve()
    build_intact(build, options.processes)

    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.kernel]
    survived = 0
    with ThreadPoolExecutor(options.processes) as pool:
        tests = pool.map(lambda mutation: noticed_by(mutation, build), chosen)
        for mutation, test in zip(chosen, tests, strict=True):
            survived += test is None and not mutation.equivalent
            row = row_of(mutation, test)
            print(row, end="", flush=True)
            update_table(row)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
