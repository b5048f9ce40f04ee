"""Builds, tests and measures on a GPU in one go, without network, within minutes.

    python -m bench.gpu.report --out DIR [--minutes 9] [--dry-run] [--skip STEP ...]

Writes DIR/report.json anew after every step, and DIR/log.txt. A step that fails or takes too long
does not stop the others. A dry run goes the same way on the CPU and reports no number of a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
LOG_BYTES_PER_COMMAND = 1 << 20
GRACE_SECONDS = 6  # between asking a command to end and ending it
STALL_SECONDS = 60  # without a finished case: a kernel hangs
SOURCES = ("csrc", "kvevict", "bench", "tests", "third_party/cmake", "CMakeLists.txt", "setup.py")


# --- commands ------------------------------------------------------------------------------------


@dataclass
class Command:
    """A process of ours with its output."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    status: str = "ok"  # or "failed", "timed out", "not available"
    seconds: float = 0.0
    output: str = ""


def run_all(commands: Sequence[Command], limit: float, log: Path) -> None:
    """Runs commands side by side, none longer than `limit`; appends what they print to the log."""
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        started = []
        for number, command in enumerate(commands):
            if shutil.which(command.arguments[0]) is None:
                command.status, command.output = "not available", f"no {command.arguments[0]}"
                continue
            output = Path(folder) / f"{number}.txt"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    command.arguments,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append((command, process, output))
        begin = time.monotonic()
        for command, process, output in started:
            try:
                process.wait(max(0.1, begin + limit - time.monotonic()))
                command.status = "ok" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                command.status = "timed out"
                stop(process)
            command.seconds = time.monotonic() - begin
            command.output = output.read_bytes()[-LOG_BYTES_PER_COMMAND:].decode(errors="replace")
    with log.open("a") as file:
        for command in commands:
            file.write(f"\n$ {' '.join(command.arguments)}\n{command.output}\n")
            file.write(f"-> {command.status} after {command.seconds:.1f} s\n")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a process and what it started, so that it can say how far it came; then kills."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS)
            if number == signal.SIGINT:
                continue  # its children may live on
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def python(*arguments: str, **environment: str) -> Command:
    """A command of this Python."""
    return Command([sys.executable, *arguments], environment)


def printed(*arguments: str) -> str | None:
    """What a quick command prints; None if it cannot be run."""
    try:
        run = subprocess.run(
            arguments, cwd=ROOT, timeout=20, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.decode(errors="replace").strip() if run.returncode == 0 else None


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One part of the run: not longer than `limit`; `reserve` seconds are kept for it."""

    name: str
    run: Callable[[Run, float], dict[str, Any]]
    limit: float
    reserve: float


class Run:
    """The state of a run, and its report."""

    def __init__(self, out: Path, minutes: float, dry_run: bool) -> None:
        """Makes the folder."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry_run = out, dry_run
        self.log = out / "log.txt"
        self.log.write_text("")
        self.end = time.monotonic() + 60 * minutes
        self.report: dict[str, Any] = {
            "dry_run": dry_run,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": None,
            "commit": None,
            "versions": {},
            "steps": [],
            "ceilings": None,
            "rows": [],
        }

    def save(self) -> None:
        """Writes the report as it stands, never half of it."""
        file = self.out / "report.json"
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.report, indent=1) + "\n")
        fresh.replace(file)

    def execute(self, commands: Sequence[Command], limit: float) -> dict[str, Any]:
        """Runs commands side by side; the worst status counts."""
        run_all(commands, limit, self.log)
        ranks = ("ok", "not available", "timed out", "failed")
        worst = max(commands, key=lambda command: ranks.index(command.status))
        result: dict[str, Any] = {"status": worst.status}
        if worst.status != "ok":
            result["tail"] = worst.output[-1500:]
        return result

    def go_through(self, steps: Sequence[Step], skipped: Sequence[str]) -> None:
        """Runs the steps one after the other within the time."""
        for index, step in enumerate(steps):
            later = sum(other.reserve for other in steps[index + 1 :])
            limit = min(step.limit, self.end - time.monotonic() - later)
            begin = time.monotonic()
            if step.name in skipped:
                result = {"status": "skipped"}
            elif limit < 1:
                result = {"status": "no time left"}
            else:
                try:
                    result = step.run(self, limit)
                except Exception as error:
                    result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            seconds = round(time.monotonic() - begin, 2)
            entry = {"name": step.name, "status": result.pop("status"), "seconds": seconds}
            self.report["steps"].append({**entry, **result})
            self.save()
            print(f"{step.name}: {entry['status']}, {seconds:.1f} s", flush=True)


# --- steps ---------------------------------------------------------------------------------------


def environment(run: Run, limit: float) -> dict[str, Any]:
    """The hardware, the versions and what source is measured."""
    fields = "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem,power.limit"
    line = printed("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    if line and not run.dry_run:
        values = [value.strip() for value in line.splitlines()[0].split(",")]
        run.report["gpu"] = dict(zip(fields.split(","), values, strict=False))
    packages = ("torch", "triton", "transformers", "pytest", "hypothesis", "numpy", "flashinfer")
    run.report["versions"] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "nvcc": (printed("nvcc", "--version") or "none").splitlines()[-1],
        "cmake": (printed("cmake", "--version") or "none").splitlines()[0],
        **{name: version_of(name) for name in packages},
    }
    run.report["commit"] = {
        "hash": printed("git", "rev-parse", "HEAD") or os.environ.get("KVEVICT_COMMIT"),
        "changed_files": (printed("git", "status", "--porcelain") or "").splitlines()[:50],
        "source_sha256": hash_of_sources(),
    }
    run.log.open("a").write(json.dumps(run.report, indent=1) + "\n")
    if run.dry_run:
        return {"status": "rehearsed"}
    return {"status": "ok" if run.report["gpu"] else "failed"}


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hash_of_sources() -> str:
    """Says which source was measured where git cannot."""
    digest = hashlib.sha256()
    suffixes = {".py", ".h", ".cpp", ".cu", ".cmake", ".txt", ".map"}
    for top in SOURCES:
        path = ROOT / top
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in found:
            if file.is_file() and file.suffix in suffixes and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def build(run: Run, limit: float) -> dict[str, Any]:
    """The library in the source tree, by pip, or by cmake where pip cannot."""
    capability = (run.report["gpu"] or {}).get("compute_cap", "9.0")
    number = capability.replace(".", "")
    architecture = "90a-real" if number == "90" else f"{number}-real"
    options = {"KVEVICT_CUDA": "ON", "KVEVICT_CUDA_ARCHS": architecture}
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--use-pep517"]
    by_pip = python(*pip, "--no-index", "-v", "-e", ".", **options)
    folder = "build/gpu-report"
    configure = ["cmake", "-S", ".", "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={ROOT}"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    by_cmake = [
        Command(configure),
        Command(["cmake", "--build", folder, "--parallel", str(os.cpu_count())]),
        Command(["cmake", "--install", folder]),
    ]
    commands = [" ".join(command.arguments) for command in (by_pip, *by_cmake)]
    if run.dry_run:
        return {"status": "rehearsed", "commands": commands}
    end = time.monotonic() + limit
    result = run.execute([by_pip], limit)
    if result["status"] == "failed" and end - time.monotonic() > 20:
        why = result["tail"][-500:]
        for command in by_cmake:
            result = run.execute([command], max(1, end - time.monotonic()))
            if result["status"] != "ok":
                break
        return {**result, "by": "cmake", "pip": why}
    return {**result, "by": "pip", "architecture": architecture}


def load(run: Run, limit: float) -> dict[str, Any]:
    """The library with this torch: every op is called."""
    device = ["--device", "cpu", "--brief"] if run.dry_run else []
    command = python("-m", "bench.gpu.sanitize", *device)
    result = run.execute([command], limit)
    if command.output.startswith("{"):
        result["build_info"] = json.loads(command.output.splitlines()[0])
    return {**result, "summary": summary_of(command, r"\d+ calls, \d+ failures.*")}


def tests(run: Run, limit: float) -> dict[str, Any]:
    """The tests of the ops on CUDA."""
    what = ["tests/ops/test_null.py", "-k", "cpu"] if run.dry_run else ["tests/ops", "-k", "cuda"]
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") and not run.dry_run else []
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", *workers]
    command = python("-m", "pytest", *what, *options)
    result = run.execute([command], max(1, limit - GRACE_SECONDS))
    failed = re.findall(r"^(?:FAILED|ERROR) .*", command.output, re.MULTILINE)
    summary = summary_of(command, r"\d+ (?:passed|failed|error|deselected|skipped).*")
    if summary is None and result["status"] == "timed out":
        dots = "".join(re.findall(r"^[.FEsx]+", command.output, re.MULTILINE))
        summary = f"cut off after {dots.count('.')} passed, {dots.count('F')} failed"
    return {**result, "summary": summary, "failed": [line[:300] for line in failed[:60]]}


def summary_of(command: Command, pattern: str) -> str | None:
    """The last line of the output that matches."""
    found = re.findall(pattern, command.output)
    return found[-1].strip("= ") if found else None


def sanitizers(run: Run, limit: float) -> dict[str, Any]:
    """All four tools side by side; torch's cache is off, so that allocations end where they end."""
    options = ["--error-exitcode", "7", "--print-limit", "20"]
    small = [sys.executable, "-m", "bench.gpu.sanitize"]
    commands = {
        tool: Command(
            [find_sanitizer(), "--tool", tool, *options, *small],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in SANITIZERS
    }
    if run.dry_run:
        return {
            "status": "rehearsed",
            "commands": [" ".join(c.arguments) for c in commands.values()],
        }
    result = run.execute(list(commands.values()), limit)
    tools = {}
    for tool, command in commands.items():
        summary = summary_of(command, r"(?:ERROR|RACECHECK) SUMMARY: .*")
        # The program's own exit status is not the tool's: a refusal of the device fails, too.
        tools[tool] = {
            "status": command.status,
            "seconds": round(command.seconds, 1),
            "summary": summary,
            "calls": summary_of(command, r"\d+ calls, \d+ failures.*"),
        }
    return {**result, "tools": tools}


def find_sanitizer() -> str:
    """The tool on PATH, or where CUDA installs it."""
    places = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
    return next((place for place in places if shutil.which(place)), places[0])


def graphs(run: Run, limit: float) -> dict[str, Any]:
    """Capture and replay of every op."""
    command = python("-m", "bench.gpu.graphs", *(["--dry-run"] if run.dry_run else []))
    result = run.execute([command], limit)
    return {**result, "summary": summary_of(command, r"\d+ graphs, \d+ failures.*")}


def ceilings(run: Run, limit: float) -> dict[str, Any]:
    """What the GPU can do at most."""
    file = run.out / "ceilings.json"
    file.unlink(missing_ok=True)
    dry_run = ["--dry-run"] if run.dry_run else []
    result = run.execute([python("-m", "bench.gpu.ceilings", "--out", str(file), *dry_run)], limit)
    if file.exists():
        run.report["ceilings"] = json.loads(file.read_text())
    return result


def benchmarks(run: Run, limit: float) -> dict[str, Any]:
    """The cases one after the other; a process that breaks or hangs is replaced by another."""
    end = time.monotonic() + limit
    rows = run.out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    first, broken, not_run = 0, [], []
    while True:
        left = end - time.monotonic()
        if left < 5:
            break
        arguments = ["--out", str(rows), "--ceilings", str(run.out / "ceilings.json")]
        arguments += ["--seconds", str(max(1.0, left - 20)), "--first", str(first)]
        dry_run = ["--dry-run"] if run.dry_run else []
        command = python("-m", "bench.gpu.cases", *arguments, *dry_run)
        watch(command, rows, left, run.log)
        lines = read_lines(rows)
        run.report["rows"] = [line["row"] for line in lines if "row" in line]
        run.save()
        if command.status == "ok":
            break
        last = max((line["index"] for line in lines), default=-1)
        if last < first:  # it did not even begin
            tail = command.output[-1500:]
            return {"status": "failed", "broken": broken, "tail": tail}
        started = next(line for line in lines if line["index"] == last)
        broken.append({"case": started.get("started"), "status": command.status})
        first = last + 1
    lines = read_lines(rows)
    not_run = [line["not_run"] for line in lines if "not_run" in line]
    wrong = [row for row in run.report["rows"] if "kvevict" in row["errors"]]
    status = "failed" if broken or wrong else "timed out" if not_run else "ok"
    counts = {"rows": len(run.report["rows"]), "without_timing": len(wrong)}
    return {"status": status, **counts, "broken": broken, "not_run": not_run}


def watch(command: Command, rows: Path, limit: float, log: Path) -> None:
    """Runs the command as long as its file of rows keeps growing."""
    begin = time.monotonic()
    with tempfile.TemporaryFile(dir=log.parent) as output:
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        size, grown = 0, begin
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            fresh = rows.stat().st_size if rows.exists() else 0
            if fresh != size:
                size, grown = fresh, now
            if now - grown > STALL_SECONDS or now - begin > limit - GRACE_SECONDS:
                stop(process)
                command.status = "hung" if now - grown > STALL_SECONDS else "timed out"
                break
        else:
            command.status = "ok" if process.returncode == 0 else "failed"
        output.seek(0)
        command.output = output.read()[-LOG_BYTES_PER_COMMAND:].decode(errors="replace")
    command.seconds = time.monotonic() - begin
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command.arguments)}\n{command.output}\n-> {command.status}\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


# A limit is for the worst; what a step leaves over goes to the benchmarks.
STEPS = (
    Step("environment", environment, limit=30, reserve=3),
    Step("build", build, limit=170, reserve=100),
    Step("load", load, limit=40, reserve=10),
    Step("tests", tests, limit=150, reserve=40),
    Step("sanitizers", sanitizers, limit=75, reserve=40),
    Step("graphs", graphs, limit=35, reserve=15),
    Step("ceilings", ceilings, limit=45, reserve=25),
    Step("benchmarks", benchmarks, limit=600, reserve=130),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all steps; the exit status says only whether there is a report."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--skip", action="append", default=[], choices=[s.name for s in STEPS])
    options = parser.parse_args(arguments)
    run = Run(options.out.resolve(), options.minutes, options.dry_run)
    run.go_through(STEPS, options.skip)
    print_table(run)


def print_table(run: Run) -> None:
    """The table last: what is seen of a long output is its end."""
    text = printed(sys.executable, "-m", "bench.table", str(run.out / "report.json"))
    if text:
        print(text)
    for step in run.report["steps"]:
        print(f"{step['name']}: {step['status']} ({step['seconds']} s) {step.get('summary') or ''}")


if __name__ == "__main__":
    main()
