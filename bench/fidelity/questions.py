"""Questions to ask a model: about mosaics, or a user's own about photos."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bench.fidelity.data import (
    Design,
    answer_ids,
    draw_mosaics,
    prompt_ids,
    question_ids,
    vision_tokens,
)
from kvevict.demo import prompt_text

BATCH = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions that are asked together.

    Attributes:
        inputs: arguments of `generate`.
        answers: what is right, one entry per question.
        num_new: tokens to generate.
        needed: [batch_size, prompt_len] bool, the tokens that show the answer; None = unknown.
    """

    inputs: dict[str, Tensor]
    answers: Sequence[Any]
    num_new: int
    needed: Tensor | None = None

    def first(self, count: int) -> Batch:
        """Return the first `count` questions; every input must have one entry per question."""
        return Batch(
            inputs={name: tensor[:count] for name, tensor in self.inputs.items()},
            answers=self.answers[:count],
            num_new=self.num_new,
            needed=None if self.needed is None else self.needed[:count],
        )


@dataclass(frozen=True, eq=False)
class Task:
    """A model and questions for it.

    Attributes:
        name: of the checkpoint.
        model: a Hugging Face model.
        batches: the questions.
        score: takes generated ids [batch_size, num_new] and the batch's answers; returns what is
            right as a whole [batch_size] bool, and in part [batch_size] float.
        needs: whether the needed tokens are known.
    """

    name: str
    model: Any
    batches: Sequence[Batch]
    score: Callable[[Tensor, Sequence[Any]], tuple[Tensor, Tensor]]
    needs: bool


def load_metrics(folder: Path) -> dict[str, Any]:
    """Read what training noted about a checkpoint.

    Raises:
        FileNotFoundError: if it was not trained here.
    """
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def load_mosaics(folder: Path, split: str, count: int, device: torch.device) -> Task:
    """Load a trained checkpoint and draw one question each about `count` mosaics.

    The questions depend on the design and the split only: all seeds answer the same ones, and
    fewer are the first of more.
    """
    design = Design(**load_metrics(folder)["design"])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    sizes = [min(BATCH, count - done) for done in range(0, count, BATCH)]
    batches = [_draw_batch(design, split, generator, device).first(size) for size in sizes]
    return Task(folder.name, model.eval().to(device), batches, score_digits, needs=True)


def _draw_batch(
    design: Design, split: str, generator: torch.Generator, device: torch.device
) -> Batch:
    pixels, labels = draw_mosaics(design, split, BATCH, generator)
    segments = torch.randint(design.num_segments, (BATCH, 1), generator=generator)
    ids = prompt_ids(design, question_ids(design, segments, generator)[:, 0])
    needed = torch.zeros_like(ids, dtype=torch.bool)
    needed.scatter_(1, 1 + vision_tokens(design, segments)[:, 0], True)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Batch(
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        answers=answer_ids(design, labels, segments)[:, 0].tolist(),
        num_new=design.width,
        needed=needed.to(device),
    )


def score_digits(generated: Tensor, answers: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Compare token by token; the part is taken over all tokens but the first.

    The first comes from the whole prompt whatever is evicted.
    """
    right = generated.cpu() == torch.tensor(answers)
    return right.all(1), right[:, 1:].double().mean(1)


def load_questions(
    model_name: str, file: Path, count: int, num_new: int, device: torch.device
) -> Task:
    """Load a checkpoint, its processor and a user's questions, to be asked one at a time.

    Args:
        model_name: folder or id of a vision-language model.
        file: JSON lines {"image": path, "question": str, "answer": str or [str]}; paths are
            relative to the file.
        count: at most so many questions.
        num_new: tokens of an answer, at most.
        device: where to run.
    """
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(model_name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_name, dtype="auto")
    batches = []
    for line in file.read_text().splitlines()[:count]:
        question = json.loads(line)
        with Image.open(file.parent / question["image"]) as image:
            photo = image.convert("RGB")
        prompt = prompt_text(processor, question["question"])
        inputs = processor(images=photo, text=prompt, return_tensors="pt").to(device, model.dtype)
        answer = question["answer"]
        answers = [[answer] if isinstance(answer, str) else answer]
        batches.append(Batch(dict(inputs), answers, num_new))
    score = partial(score_words, processor)
    return Task(Path(model_name).name, model.eval().to(device), batches, score, needs=False)


def score_words(
    processor: Any, generated: Tensor, answers: Sequence[list[str]]
) -> tuple[Tensor, Tensor]:
    """Compare words without case, punctuation and articles; the part is F1 over words."""
    texts = processor.batch_decode(generated, skip_special_tokens=True)
    exact, parts = [], []
    for text, allowed in zip(texts, answers, strict=True):
        words = _words(text)
        exact.append(any(words == _words(answer) for answer in allowed))
        parts.append(max(_f1(words, _words(answer)) for answer in allowed))
    return torch.tensor(exact), torch.tensor(parts, dtype=torch.float64)


def _words(text: str) -> list[str]:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return [word for word in words if word not in {"a", "an", "the"}]


def _f1(ours: list[str], theirs: list[str]) -> float:
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else float(ours == theirs)
