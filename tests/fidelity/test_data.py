"""Mosaics, questions and what they need."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from bench.fidelity.data import (
    DESIGNS,
    FIRST_DIGIT,
    FIRST_REGION,
    IMAGE_ID,
    PIXEL_MEAN,
    PIXEL_STD,
    SPLITS,
    Design,
    answer_ids,
    digit_bank,
    draw_mosaics,
    prompt_ids,
    question_ids,
    split_indices,
    vision_tokens,
)


def test_the_splits_are_disjoint_and_complete() -> None:
    images = torch.cat([split_indices(split) for split in SPLITS])
    assert images.sort().values.tolist() == list(range(1797))


def test_no_image_of_one_split_is_in_another() -> None:
    seen = [{tuple(x.flatten().tolist()) for x in digit_bank(split)[0]} for split in SPLITS]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_the_first_training_digits_are_the_plain_ones() -> None:
    pixels, labels = digit_bank("train")
    count = len(split_indices("train"))
    assert len(pixels) == len(labels) == 41 * count
    assert torch.equal(labels[:count], labels[-count:])
    assert (pixels[:count] - pixels[-count:]).abs().mean() < 0.25


@pytest.mark.parametrize("name", DESIGNS)
def test_needed_tokens_show_the_answer(name: str) -> None:
    design = DESIGNS[name]
    generator = torch.Generator().manual_seed(0)
    pixels, labels = draw_mosaics(design, "test", 2, generator)
    segments = torch.randint(design.num_segments, (2, 3), generator=generator)
    answers = answer_ids(design, labels, segments) - FIRST_DIGIT
    tokens = vision_tokens(design, segments)
    assert tokens.shape == (2, 3, design.num_needed)
    patch = design.patch
    patches = pixels[:, 0].unfold(1, patch, patch).unfold(2, patch, patch).flatten(1, 2)
    bank = {tuple(x.flatten().tolist()): y for x, y in zip(*digit_bank("test"), strict=True)}
    for b in range(2):
        for q in range(3):
            shown = patches[b, tokens[b, q]].view(design.cells, -1, patch, patch)
            strip = shown.transpose(1, 2).reshape(8, 8 * design.width) * PIXEL_STD + PIXEL_MEAN
            for k, digit in enumerate(answers[b, q]):
                image = (strip[:, 8 * k : 8 * k + 8] * 16).round() / 16
                assert bank[tuple(image.flatten().tolist())] == digit


@pytest.mark.parametrize("name", DESIGNS)
def test_a_prompt_names_its_region(name: str) -> None:
    design = DESIGNS[name]
    segments = torch.arange(design.num_segments)
    questions = question_ids(design, segments, torch.Generator().manual_seed(0))
    prompts = prompt_ids(design, questions)
    assert prompts.shape == (design.num_segments, design.prompt_len)
    assert ((prompts == IMAGE_ID).sum(1) == design.num_vision).all()
    assert prompts.max() < design.vocab_size
    rows, columns = (questions[:, 1:3] - FIRST_REGION).T
    first_digit = segments * design.width
    assert rows.tolist() == (first_digit // design.grid).tolist()
    assert columns.tolist() == (design.grid + first_digit % design.grid).tolist()


def test_designs_have_the_sizes_they_are_named_for() -> None:
    sizes = {name: (d.num_vision, d.num_needed, d.question_len) for name, d in DESIGNS.items()}
    assert sizes == {
        "h": (256, 8, 4),
        "q": (576, 24, 4),
        "long": (256, 8, 16),
        "xl": (1024, 32, 4),
    }
    assert Design("tiny", grid=4, patch=4, width=2).num_vision == 64
