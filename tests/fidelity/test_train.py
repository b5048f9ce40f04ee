"""A tiny design, trained for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from bench.fidelity.data import (
    DESIGNS,
    Design,
    answer_ids,
    draw_mosaics,
    prompt_ids,
    question_ids,
    vision_tokens,
)
from bench.fidelity.model import bag_loss, build_model, text_logits, vision_features
from bench.fidelity.train import STATE, WHOLE, Recipe, Trainer, train, write_checkpoint

TINY = Design("tiny", grid=4, patch=4, width=2, num_filler=1)
RECIPE = Recipe(
    alignment_steps=3, stages=(1, 2), max_stage_steps=2, whole_steps=3, batch=2, num_questions=2
)
NUM_STEPS = 3 + 2 * 2 + 3
CPU = torch.device("cpu")


def run(out: Path, *stops: int) -> Trainer:
    for stop in stops:
        train(TINY, RECIPE, 7, CPU, out, max_steps=stop)
    return train(TINY, RECIPE, 7, CPU, out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return run(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("stops", [(), (3, 1), (6, 2, 1)])
def test_an_interrupted_run_ends_with_the_same_bits(
    stops: tuple[int, ...], uninterrupted: Trainer, tmp_path: Path
) -> None:
    trainer = run(tmp_path, *stops)
    assert trainer.is_done and trainer.progress.phase == WHOLE
    expected = uninterrupted.model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(trainer.generator.get_state(), uninterrupted.generator.get_state())
    assert trainer.progress.digit_accuracy == uninterrupted.progress.digit_accuracy


def test_another_seed_is_another_model(uninterrupted: Trainer, tmp_path: Path) -> None:
    other = train(TINY, RECIPE, 8, CPU, tmp_path)
    weight = other.model.lm_head.weight
    assert not torch.equal(weight, uninterrupted.model.lm_head.weight)


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train(TINY, RECIPE, 7, CPU, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="holds another run"):
        train(TINY, RECIPE, 8, CPU, tmp_path)


def test_what_is_written_can_be_loaded_and_says_how_it_was_made(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    metrics = write_checkpoint(trainer, tmp_path, "the command")
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["command"] == "the command" and metrics["seed"] == 7
    assert metrics["validation"].keys() == metrics["test"].keys() >= {"exact_match", "per_digit"}
    assert (tmp_path / "model.safetensors").stat().st_size < 2_000_000
    assert (tmp_path / STATE).exists()


@pytest.mark.parametrize("name", DESIGNS)
def test_models_are_small(name: str) -> None:
    model = build_model(DESIGNS[name], 0)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_packed_questions_equal_single_ones() -> None:
    model = build_model(TINY, 0).eval()
    generator = torch.Generator().manual_seed(0)
    pixels, labels = draw_mosaics(TINY, "validation", 2, generator)
    segments = torch.randint(TINY.num_segments, (2, 3), generator=generator)
    questions = question_ids(TINY, segments, generator)
    answers = answer_ids(TINY, labels, segments)
    text = torch.cat([questions, answers[..., :-1]], -1)
    with torch.no_grad():
        packed = text_logits(model, vision_features(model, pixels), None, text)
        for q in range(3):
            ids = prompt_ids(TINY, text[:, q])
            single = model(input_ids=ids, pixel_values=pixels).logits[:, 1 + TINY.num_vision :]
            torch.testing.assert_close(packed[:, q], single, atol=1e-4, rtol=1e-4)


def test_hidden_segments_are_not_seen_and_the_others_stay_where_they_are() -> None:
    model = build_model(TINY, 0).eval()
    generator = torch.Generator().manual_seed(0)
    pixels, _ = draw_mosaics(TINY, "validation", 1, generator)
    text = question_ids(TINY, torch.tensor([[3]]), generator)
    seen = vision_tokens(TINY, torch.tensor([[3, 5]])).flatten(1).sort(1).values
    with torch.no_grad():
        features = vision_features(model, pixels)
        chosen = features[:, seen[0]]
        of_two = text_logits(model, chosen, seen, text)
        everything = torch.arange(TINY.num_vision)[None]
        torch.testing.assert_close(
            text_logits(model, features, everything, text),
            text_logits(model, features, None, text),
        )
        shifted = text_logits(model, chosen, seen - 1, text)
    assert not torch.equal(of_two, shifted)


def test_the_bag_has_no_order() -> None:
    logits = torch.randn(2, 3, 9, 40, generator=torch.Generator().manual_seed(0))
    answers = torch.randint(4, 14, (2, 3, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bag_loss(logits, answers), bag_loss(logits, answers.flip(2)))
    certain = torch.full((1, 1, 9, 40), -30.0)
    certain[0, 0, 2, [5, 7]] = 0.0
    assert bag_loss(certain, torch.tensor([[[5, 7]]])) < 1e-5
