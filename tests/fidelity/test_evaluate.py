"""The committed checkpoint of design H: what its accuracy says, and who agrees on what is kept."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from bench.fidelity import evaluate, tables
from bench.fidelity.controls import Oracle, RandomVision, Without
from bench.fidelity.evaluate import Method, ask, measure, parse_method, wilson
from bench.fidelity.questions import Batch, Task, load_mosaics, score_words
from bench.fidelity.tables import Row
from kvevict import policies
from kvevict.policies import IMAGE, TEXT, Prompt
from tests.fidelity.checkpoints import CHECKPOINTS, FOLDERS
from tests.integrations.masked_reference import kept_mask, masked_reference
from tests.integrations.tiny_models import save_llava
from tests.policies.oracles import Sequence, keep_by_oracle

DECODE_FIELDS: dict[str, dict[str, Any]] = {
    name: {"decode": "append"}
    for name in ("d2o", "h2o", "hae", "keepkv", "streaming_llm", "zsmerge")
}
"""Masks say what is gone after the prompt; dropping more in decoding is tested elsewhere."""


@cache
def task() -> Task:
    return load_mosaics(CHECKPOINTS / "h-0", "test", 96, torch.device("cpu"))


def exact_match(policy: Any) -> float:
    """Return the share of right answers to all questions."""
    method = Method("", policy if callable(policy) else lambda *_: policy)
    tally = measure(task(), method, 0.1)
    return sum(tally.right) / len(tally.right)


@cache
def full() -> float:
    return exact_match(None)


def few(count: int) -> Batch:
    """Return the first questions."""
    return task().batches[0].first(count)


# What the accuracy says


def test_the_full_cache_answers() -> None:
    assert full() >= 0.95


def test_without_the_needed_tokens_nothing_is_right() -> None:
    assert exact_match(lambda _, batch: Without(removed=batch.needed)) <= 0.01


def test_without_the_image_nothing_is_right() -> None:
    assert exact_match(Without()) <= 0.01


@pytest.mark.parametrize("per_head", [False, True])
def test_random_tokens_do_not_answer(per_head: bool) -> None:
    assert exact_match(RandomVision(keep=0.1, per_head=per_head)) <= 0.05


def test_the_needed_tokens_are_enough() -> None:
    assert exact_match(lambda keep, b: Oracle(keep=keep, needed=b.needed)) >= full() - 0.02


def test_forcing_the_first_token_repairs_a_window() -> None:
    question = {"keep": 0.2, "window": 4, "pool_kernel": 1}
    without, forced = (
        exact_match(policies.get("snapkv", num_sink=count, **question)) for count in (0, 1)
    )
    assert without < forced
    assert forced >= full() - 0.01


# Who agrees


def only_moves(name: str) -> bool:
    """Whether what a policy keeps stays as it is: neither merged nor narrowed."""
    policy = policies.get(name, keep=0.15)
    return not isinstance(policy, policies.MergingPolicy | policies.ChannelPolicy)


@pytest.mark.parametrize("name", filter(only_moves, policies.list(with_keep=True)))
def test_moving_equals_masking(name: str) -> None:
    batch = few(8)
    policy = policies.get(name, keep=0.15, **DECODE_FIELDS.get(name, {}))
    generated, report = ask(task().model, batch, policy)
    assert report is not None
    prompt_len = batch.inputs["input_ids"].shape[1]
    kept = {layer.layer_idx: kept_mask(layer.kept_indices, prompt_len) for layer in report.kept}
    assert len(kept) == task().model.config.text_config.num_hidden_layers
    with masked_reference(task().model, prompt_len, kept):
        masked, _ = ask(task().model, batch, None)
    assert torch.equal(generated, masked)


@cache
def recorded() -> dict[str, list[Tensor]]:
    """Return queries, keys and values of three prompts, per layer."""
    batch = few(3)
    prompt_len = batch.inputs["input_ids"].shape[1]
    with masked_reference(task().model, prompt_len) as reference, torch.inference_mode():
        task().model(**batch.inputs)
    layers = [reference.recorded[layer][0] for layer in sorted(reference.recorded)]
    names = ("queries", "keys", "values")
    return {name: [layer[i] for layer in layers] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", policies.list(with_keep=True))
def test_kernels_keep_what_the_float64_oracle_keeps(name: str) -> None:
    ids = few(3).inputs["input_ids"]
    policy = policies.get(name, keep=0.15)
    image = ids == task().model.config.image_token_index
    prompt = Prompt(torch.where(image, IMAGE, TEXT).to(torch.int8))
    _, _, selections = policies.evict_prompt(policy, prompt=prompt, **recorded())
    assert selections is not None
    for b in range(len(ids)):
        row = "".join("i" if is_image else "t" for is_image in image[b])
        alone = [[layer[b] for layer in recorded()[n]] for n in ("queries", "keys", "values")]
        expected = keep_by_oracle(name, policy, Sequence(row, *alone))
        for layer, (selection, lists) in enumerate(zip(selections, expected, strict=True)):
            masks = kept_mask(selection.kept_indices[b], len(row))
            ours = [mask.nonzero()[:, 0].tolist() for mask in masks]
            theirs = lists * (len(ours) // len(lists))
            assert ours == theirs, f"layer {layer} of question {b}"


# The questions


def test_fewer_questions_are_the_first_of_more() -> None:
    folder, device = CHECKPOINTS / "h-0", torch.device("cpu")
    (fewer,) = load_mosaics(folder, "test", 3, device).batches
    more = few(3)
    assert fewer.answers == more.answers
    assert all(torch.equal(fewer.inputs[name], more.inputs[name]) for name in more.inputs)
    counts = [len(batch.answers) for batch in load_mosaics(folder, "test", 70, device).batches]
    assert counts == [64, 6]


# What is committed


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_is_what_its_metrics_describe(name: str) -> None:
    folder = CHECKPOINTS / name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert name == f"{metrics['design']['name']}-{metrics['seed']}"
    weights = (folder / "model.safetensors").read_bytes()
    assert metrics["sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(weights) <= 2_000_000
    assert metrics["test"]["exact_match"] >= 0.95


# The tool


def test_the_command_writes_tables_and_a_plot(tmp_path: Path) -> None:
    folder = str(CHECKPOINTS / "h-0")
    budgets = ["--budgets", ".1,1", "--n", "4", "--out", str(tmp_path)]
    methods = ["--methods", "snapkv,snapkv/window=4/pool_kernel=1"]
    assert evaluate.main(["--checkpoint", folder, folder, *methods, *budgets]) == 0
    result = json.loads((tmp_path / "fidelity.json").read_text())
    (command,) = result["commands"]
    assert command.startswith("python -m bench.fidelity.evaluate --checkpoint ")
    rows = result["rows"]
    assert len(rows) == 2 * (3 + 3 * 2 + 2 * 2)
    whole = [row for row in rows if row["budget"] == 1.0]
    assert {row["kept"] for row in whole} == {1.0}
    assert {row["exact_match"] for row in whole} == {rows[0]["exact_match"]}
    assert len(rows[0]["recall"]) == 3
    assert "| snapkv/window=4/pool_kernel=1 |" in (tmp_path / "fidelity.md").read_text()
    for picture in ("fidelity.png", "kept.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def row_of(checkpoint: str, method: str, budget: float | None, right: int, count: int = 100) -> Row:
    share = right / count
    return Row(
        checkpoint, method, budget, share, wilson(share, count), share, (0.0, 1.0), 0.1, [], count
    )


def test_results_are_joined(tmp_path: Path) -> None:
    of_file = [
        ("b", [row_of("h-1", "tova", 0.1, 60), row_of("h-1", "full", None, 97)]),
        ("a", [row_of("h-0", "full", None, 98), row_of("h-0", "tova", 0.1, 70)]),
        ("c", [row_of("h-0", "tova", 0.1, 1), row_of("h-0", "snapkv", 0.1, 74)]),
    ]
    files = []
    for command, rows in of_file:
        files.append(tmp_path / f"{command}.json")
        tables.write_json([command], rows, files[-1])
    assert tables.main([*map(str, files), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "fidelity.json").read_text())
    assert result["commands"] == ["b", "a", "c"]
    found = [(r["checkpoint"], r["method"], r["exact_match"]) for r in result["rows"]]
    assert found == [
        ("h-0", "tova", 0.7),
        ("h-0", "full", 0.98),
        ("h-0", "snapkv", 0.74),
        ("h-1", "tova", 0.6),
        ("h-1", "full", 0.97),
    ]
    markdown = (tmp_path / "fidelity.md").read_text()
    assert "| tova | 65.0 (60.0 to 70.0) |" in markdown
    # One standard error of 74 in 100 is 4.4.
    assert "| h-0 | snapkv 74.0 (tova) |" in markdown
    assert "| h-1 | tova 60.0 |" in markdown


@pytest.mark.parametrize("design", ["h", "long", "q"])
def test_committed_tables_are_those_of_the_committed_results(design: str) -> None:
    folder = CHECKPOINTS.with_name("results")
    commands, rows = tables.join([folder / f"{design}.json"])
    assert {row.checkpoint for row in rows} == {f"{design}-{seed}" for seed in range(3)}
    assert commands
    assert (folder / f"{design}.md").read_text() == tables.to_markdown(rows)


def test_rows_of_other_questions_are_not_joined(tmp_path: Path) -> None:
    rows = [row_of("h-0", "tova", 0.1, 7), row_of("h-0", "snapkv", 0.1, 7, count=10)]
    tables.write_json(["a"], rows, tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"must be of as many questions, got \[10, 100\]"):
        tables.join([tmp_path / "a.json"])


def test_controls_are_those_of_the_tables() -> None:
    assert tuple(m.name for m in evaluate.control_methods(needs=True)) == tables.CONTROLS


def test_the_command_runs_on_a_real_checkpoint(tmp_path: Path) -> None:
    from PIL import Image

    save_llava(tmp_path / "model")
    Image.new("RGB", (30, 40), (200, 30, 90)).save(tmp_path / "a.png")
    questions = [
        {"image": "a.png", "question": "What is it", "answer": "nothing"},
        {"image": "a.png", "question": "is it", "answer": ["it", "a cat"]},
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "questions.jsonl").write_text(lines)
    which = ["--model", str(tmp_path / "model"), "--questions", str(tmp_path / "questions.jsonl")]
    how = ["--methods", "tgv_kv", "--budgets", ".5", "--new-tokens", "3", "--out", str(tmp_path)]
    assert evaluate.main([*which, *how]) == 0
    rows = json.loads((tmp_path / "fidelity.json").read_text())["rows"]
    names = ["full", "text only", "random vision", "random vision per head", "tgv_kv"]
    assert [row["method"] for row in rows] == names
    assert {row["questions"] for row in rows} == {2}
    assert rows[-1]["recall"] == [] and 0.3 < rows[-1]["kept"] <= 0.5


@pytest.mark.parametrize("text", ["nosuch", "snapkv/nosuch=1", "snapkv/window=-1"])
def test_a_bad_method_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", "nowhere", "--methods", text])
    assert "evaluate: error" in capsys.readouterr().err


def test_methods_are_parsed() -> None:
    policy = parse_method("mixkv/host=adakv/window=4").build(0.25, few(1))
    assert policy == policies.get("mixkv", host="adakv", window=4, keep=0.25)


def test_wilsons_interval() -> None:
    # Worked by hand: 8 of 10.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 50)[0] == 0.0


def test_recall_counts_needed_tokens() -> None:
    needed = torch.tensor([[False, True, True, False, True, True]])
    kept_indices = torch.tensor([[[0, 1, 2, -1], [0, 3, 4, -1]]], dtype=torch.int32)
    assert evaluate.recall(kept_indices, needed).tolist() == [0.375]


def test_words_are_compared_as_people_do() -> None:
    class Processor:
        def batch_decode(self, ids: Any, **_: Any) -> list[str]:
            return ["The red car!", "a blue cat"]

    answers = [["Red car", "car"], ["cat"]]
    exact, parts = score_words(Processor(), torch.zeros(2, 1), answers)
    assert exact.tolist() == [True, False]
    assert parts.tolist() == pytest.approx([1.0, 2 / 3])
