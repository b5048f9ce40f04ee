"""`python -m bench.fidelity.demo`, which `make demo` runs, on a few questions."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image

from bench.fidelity import demo
from bench.fidelity.data import DESIGNS, answer_in_words, question_ids, question_in_words
from bench.fidelity.evaluate import ask, control_methods, measure, parse_method
from bench.fidelity.questions import Task, load_mosaics
from kvevict import policies
from kvevict.demo import mib
from tests.fidelity.checkpoints import CHECKPOINTS
from tests.structure.tree import ROOT

POLICY, KEEP, COUNT = "snapkv/window=4", 0.1, 5


def load() -> Task:
    return load_mosaics(CHECKPOINTS / "h-0", "test", COUNT, torch.device("cpu"))


def methods() -> dict[str, Any]:
    """Return what the demo shows, by name, in order."""
    controls = {method.name: method for method in control_methods(True)}
    names = ("full", "random vision", "oracle")
    full, *others = (controls[name] for name in names)
    return {method.name: method for method in (full, parse_method(POLICY), *others)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """Return what the command prints."""
    arguments = ["--checkpoint", str(CHECKPOINTS / "h-0"), "--out", str(folder)]
    arguments += ["--policy", POLICY, "--keep", str(KEEP), "--questions", str(COUNT)]
    with redirect_stdout(StringIO()) as output:
        assert demo.main(arguments) == 0
    return output.getvalue()


def rows_of(printed: str, head: str) -> dict[str, list[str]]:
    """Return the cells of the table with this head, by the first of them."""
    table = printed.split(f"{head}\n")[1].split("\n\n")[0].splitlines()[1:]
    rows = [[cell for cell in line.split("  ") if cell.strip()] for line in table]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_it_says_what_the_model_is(printed: str) -> None:
    assert "LLaVA of 0.8M parameters, 3 text layers" in printed
    assert "python -m bench.fidelity.train --design h --seed 0 --out DIR" in printed
    assert "16 x 16 handwritten digits in 256 vision tokens (1 per digit)" in printed


def test_it_prints_the_answers_to_the_first_question(printed: str) -> None:
    task = load()
    first = task.batches[0].first(1)
    design = DESIGNS["h"]
    assert question_in_words(design, first.inputs["input_ids"][0, -4:]) in printed
    rows = rows_of(printed, "of full")
    right = first.answers[0]
    assert rows.pop("right") == [answer_in_words(right)]
    assert list(rows) == list(methods())
    before = 261 * 3 * 2 * 2 * 32 * 4
    for name, method in methods().items():
        generated, report = ask(task.model, first, method.build(KEEP, first))
        stored = report.bytes_after if report else before
        hits = sum(a == b for a, b in zip(generated[0].tolist(), right, strict=True))
        assert rows[name] == [
            answer_in_words(generated[0].tolist()),
            f"{hits} of 8",
            mib(stored),
            f"{stored / before:.1%}",
        ]
    assert rows["full"][1] == rows["oracle"][1] == "8 of 8"
    assert "The full cache is wrong" not in printed


def test_it_prints_what_is_measured(printed: str) -> None:
    task = load()
    rows = rows_of(printed, "needed kept")
    assert list(rows) == list(methods())
    for name, method in methods().items():
        tally = measure(task, method, KEEP)
        all_right, share, _, later, kept, needed = rows[name]
        assert all_right == f"{sum(tally.right)} of {COUNT}"
        assert share == f"{sum(tally.right) / COUNT:.1%}"
        assert later == f"{sum(tally.part) / COUNT:.1%}"
        assert kept == f"{sum(tally.kept) / COUNT:.1%}"
        by_layer = 100 * torch.tensor(tally.recall, dtype=torch.float64).mean(0)
        assert needed == " / ".join(f"{layer:.0f}" for layer in by_layer)
    assert rows["oracle"][-1] == "100 / 100 / 100"
    assert rows["random vision"][0] == f"0 of {COUNT}"


def counts_of(picture: Image.Image) -> dict[Any, int]:
    """Return how many pixels have each color."""
    colors = picture.convert("RGB").getcolors(picture.width * picture.height)
    return {color: count for count, color in colors or []}


def test_it_draws_the_mosaic_and_what_is_kept(printed: str, folder: Path) -> None:
    path = folder / "kept.png"
    assert f"Picture: {path.resolve()}" in printed
    with Image.open(path) as picture:
        width, height = picture.size
        page = counts_of(picture)
        # Above the charts, left of layer 0.
        mosaic = counts_of(picture.crop((0, 0, width // 4, height * 3 // 5)))
    assert width > 1500
    red = [n for (r, g, b), n in mosaic.items() if r > 150 and g < 100 and b < 100]
    assert sum(red) > 500
    kept = page[(255, 159, 28)]
    assert kept > 5000
    assert 0.2 < page[(255, 255, 255)] / (width * height) < 0.9


def test_what_is_asked_is_red_and_every_layer_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(demo, "plot_kept_patches", lambda *args, **_: drawn.extend(args))
    args = demo.parse_args(["--policy", POLICY, "--out", str(tmp_path)])
    task = load()
    first = task.batches[0].first(1)
    _, report = ask(task.model, first, args.policy.build(KEEP, first))
    assert report is not None and first.needed is not None
    demo.draw(args, task, report, "")
    photo, layers, path = drawn
    assert path.parent == tmp_path
    red = photo[..., 0] - photo[..., 1] > 0.1
    by_digit = red.unfold(0, 8, 8).unfold(1, 8, 8).any(-1).any(-1)
    assert torch.equal(by_digit.flatten(), first.needed[0, 1:257])
    for layer, kept in zip(layers, report.kept, strict=True):
        columns = kept.kept_indices[0].flatten().long()
        votes = torch.bincount(columns, minlength=261)[1:257] / kept.kept_indices.shape[1]
        assert torch.equal(layer.patches.flatten(), votes)


def test_a_wrong_full_cache_is_admitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_wrong(*args: Any) -> Task:
        task = load_mosaics(*args)
        task.batches[0].answers[0][3] += 1
        return task

    monkeypatch.setattr("bench.fidelity.questions.load_mosaics", load_wrong)
    arguments = ["--checkpoint", str(CHECKPOINTS / "h-0"), "--questions", "1"]
    assert demo.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert rows_of(printed, "of full")["full"][1] == "7 of 8"
    assert "The full cache is wrong here, too" in printed


def test_the_defaults_are_there() -> None:
    args = demo.parse_args([])
    assert args.policy.name == demo.POLICY
    assert args.policy.name.split("/")[0] in policies.list(with_keep=True)
    assert args.checkpoint == CHECKPOINTS / "q-0"


def test_words() -> None:
    design = DESIGNS["q"]
    ids = question_ids(design, torch.tensor([9]), torch.Generator())[0]
    assert question_in_words(design, ids) == "row 5, from column 7: which 6 digits?"
    assert answer_in_words([4, 13, 14, 3, 8]) == "0 9 ? ? 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "0"], "--questions must be at least 1"),
        (["--keep", "0"], "must be positive"),
        (["--policy", "nosuch"], "--policy: kvevict.policies.get: name must be one of"),
        (["--policy", "lightkv"], "unexpected keyword argument 'keep'"),
        (["--policy", "snapkv/window=-1"], "window must be"),
        (["--checkpoint", "/nowhere"], "there is no file /nowhere/metrics.json"),
    ],
)
def test_refused_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["matplotlib", "sklearn", "tqdm", "transformers"])
def test_a_missing_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main([]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("bench.fidelity.demo: ")
    assert module in printed
    assert 'pip install "kvevict[demo]"' in printed


def test_nothing_is_imported_before_the_extras_are_looked_for() -> None:
    program = """
import sys
for name in ("matplotlib", "PIL", "sklearn", "tqdm", "transformers"):
    sys.modules[name] = None
from bench.fidelity import demo
sys.exit(demo.main([]))
"""
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr == ""
    assert finished.stdout.endswith('pip install "kvevict[demo]"\n')
