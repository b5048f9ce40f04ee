"""Train a model of a design: `python -m bench.fidelity.train --design q --seed 0 --out DIR`.

Three phases: (1) alignment: every vision token is asked for its digit, row and column; (2) a
curriculum over how many segments of the image the decoder sees, from one to all; (3) whole images,
the tower trained along, the rate falling to zero. An interrupted run continues where it last saved
itself, and ends with the same bits as one that was not interrupted.

Writes `save_pretrained`'s files (bfloat16) and metrics.json into DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from bench.fidelity.data import (
    DESIGNS,
    Design,
    answer_ids,
    draw_mosaics,
    question_ids,
    vision_tokens,
)
from bench.fidelity.model import (
    TRAINING_ATTENTION,
    alignment_loss,
    answer_loss,
    bag_loss,
    build_model,
    text_logits,
    vision_features,
)

STATE = "training.pt"
METRICS = "metrics.json"
ALIGNMENT, CURRICULUM, WHOLE = "alignment", "curriculum", "whole images"


@dataclass(frozen=True)
class Recipe:
    """How a design is trained.

    Attributes:
        alignment_steps: of phase 1.
        alignment_rate: its peak learning rate.
        rate: that of the later phases.
        stages: segments that the decoder sees, stage by stage; the last step to all is phase 3.
        threshold: a stage is over when the worst digit of the answer is right this often.
        max_stage_steps: or after so many steps.
        whole_steps: of phase 3.
        batch: images per step of phases 1 and 3.
        num_questions: at most, about one image in one pass.
        first_weight: weight of the first digit of an answer.
        noise: standard deviation added to pixels in [0, 1].
        save_every: steps between two saves.
        autocast: compute in bfloat16 where torch's autocast does.
    """

    alignment_steps: int = 300
    alignment_rate: float = 3e-3
    rate: float = 2e-3
    stages: tuple[int, ...] = (1, 2, 4, 8, 16)
    threshold: float = 0.9
    max_stage_steps: int = 600
    whole_steps: int = 450
    batch: int = 8
    num_questions: int = 12
    first_weight: float = 3.0
    noise: float = 0.05
    save_every: int = 100
    autocast: bool = True


RECIPES = {
    "h": Recipe(),
    "q": Recipe(alignment_steps=700, whole_steps=600),
    "long": Recipe(),
    "xl": Recipe(alignment_steps=700, whole_steps=600),
}


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        phase: one of `ALIGNMENT`, `CURRICULUM`, `WHOLE`.
        stage: index into the recipe's stages.
        step: steps done in this phase or stage.
        total: steps done since the alignment.
        digit_accuracy: running accuracy per digit of the answer in this stage.
        seconds: time spent in earlier sessions and this one.
        curve: one entry per save.
    """

    phase: str = ALIGNMENT
    stage: int = 0
    step: int = 0
    total: int = 0
    digit_accuracy: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Trainer:
    """A model on its way; `save` and `load` hold all of its state."""

    def __init__(self, design: Design, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.design, self.recipe, self.seed, self.device = design, recipe, seed, device
        self.model = build_model(design, seed).to(device)
        self.model.set_attn_implementation(TRAINING_ATTENTION)
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.progress = Progress()
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.02},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.rate, betas=(0.9, 0.98))

    def save(self, path: Path) -> None:
        """Write everything the next step depends on."""
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": dataclasses.asdict(self.progress),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: if it is that of another design, recipe or seed.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["identity"] != self._identity():
            raise ValueError(f"{path} holds another run: {state['identity']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.progress = Progress(**state["progress"])

    def _identity(self) -> str:
        return f"{self.design} {self.recipe} seed={self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        progress = self.progress
        return progress.phase == WHOLE and progress.step >= self.recipe.whole_steps

    def advance(self) -> dict[str, float]:
        """Take one step and go on to the next phase or stage where it is time.

        Returns:
            What to show of the step.
        """
        self.model.train()
        if self.progress.phase == ALIGNMENT:
            return self._advance_alignment()
        return self._advance_answers()

    def _advance_alignment(self) -> dict[str, float]:
        recipe, progress = self.recipe, self.progress
        done = progress.step / recipe.alignment_steps
        rate = recipe.alignment_rate * min(1, (progress.step + 1) / 30) * max(0.1, 1 - done)
        pixels, labels = self._draw(recipe.batch)
        with self._autocast():
            features = vision_features(self.model, pixels)
        loss, accuracy = alignment_loss(self.model, self.design, features, labels)
        self._descend(loss, rate)
        progress.step += 1
        if progress.step >= recipe.alignment_steps:
            progress.phase, progress.step = CURRICULUM, 0
            self.optimizer = self._new_optimizer()
        return {"loss": loss.item(), "digits": accuracy.item()}

    def _advance_answers(self) -> dict[str, float]:
        recipe, progress, design = self.recipe, self.progress, self.design
        whole = progress.phase == WHOLE
        rate = recipe.rate * min(1, (progress.total + 1) / 100)
        if whole:
            # Adam's first steps have full size whatever the gradient, and the tower is trained.
            rate *= min(1, (progress.step + 1) / 50)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress.step / recipe.whole_steps))
        num_seen = design.num_segments if whole else recipe.stages[progress.stage]
        num_questions = min(recipe.num_questions, num_seen)
        # Short sequences come in numbers, several from one image.
        repeats = max(1, min(16, design.num_segments // (2 * num_seen)))
        num_sequences = min(4, recipe.num_questions // num_questions) * recipe.batch
        num_images = max(1, num_sequences // repeats)
        pixels, labels = self._draw(num_images)
        text, answers, seen = self._draw_questions(
            labels.repeat(repeats, 1, 1), num_seen, num_questions
        )
        with self._autocast():
            features = vision_features(self.model, pixels, train_tower=whole)
            visible = features.repeat(repeats, 1, 1)
            if seen is not None:
                index = seen[..., None].expand(-1, -1, visible.shape[-1])
                visible = visible.gather(1, index)
            logits = text_logits(self.model, visible, seen, text)
        loss, right = answer_loss(logits, answers, first_weight=recipe.first_weight)
        alignment, digits = alignment_loss(self.model, design, features, labels)
        bag = bag_loss(logits, answers)
        self._descend(loss + bag + 0.3 * alignment, rate)
        now = right.float().mean((0, 1)).tolist()
        before = progress.digit_accuracy or [0.0] * design.width
        average = [0.93 * a + 0.07 * b for a, b in zip(before, now, strict=True)]
        progress.digit_accuracy = average
        progress.step += 1
        progress.total += 1
        shown = {
            "loss": loss.item(),
            "bag": bag.item(),
            "worst": min(average),
            "digits": digits.item(),
        }
        is_over = min(average) > recipe.threshold or progress.step >= recipe.max_stage_steps
        if not whole and is_over:
            self._next_stage()
        return shown

    def _next_stage(self) -> None:
        progress = self.progress
        progress.curve.append(
            {"stage": self.recipe.stages[progress.stage], "steps": progress.step}
            | {"worst": round(min(progress.digit_accuracy), 3), "seconds": round(progress.seconds)}
        )
        progress.step, progress.digit_accuracy = 0, []
        progress.stage += 1
        if progress.stage == len(self.recipe.stages):
            progress.phase = WHOLE

    def _descend(self, loss: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        drawn = draw_mosaics(self.design, "train", count, self.generator, noise=self.recipe.noise)
        pixels, labels = drawn
        return pixels.to(self.device), labels.to(self.device)

    def _draw_questions(
        self, labels: Tensor, num_seen: int, num_questions: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose the segments that are seen, and ask for some of them.

        Returns:
            text [count, num_questions, text_len], answers [count, num_questions, width] and the
            vision tokens that are seen [count, num_seen * num_needed], None for all.
        """
        design, count = self.design, len(labels)
        noise = torch.rand(count, design.num_segments, generator=self.generator)
        shown = noise.argsort(1)[:, :num_seen]
        segments = shown[:, :num_questions]
        questions = question_ids(design, segments, self.generator)
        answers = answer_ids(design, labels.cpu(), segments)
        seen = None
        if num_seen < design.num_segments:
            seen = vision_tokens(design, shown).flatten(1).sort(1).values.to(self.device)
        text = torch.cat([questions, answers[..., :-1]], -1)
        return text.to(self.device), answers.to(self.device), seen


@torch.no_grad()
def measure(model: Any, design: Design, split: str, num_images: int = 128) -> dict[str, Any]:
    """Ask six questions about every image, all digits of the answer but the last being given.

    A greedy answer is right as a whole where each digit is right behind the right ones before it.

    Returns:
        Exact match, accuracy per digit and its mean, and the number of questions.
    """
    device = next(model.parameters()).device
    model.eval()
    generator = torch.Generator().manual_seed(0)
    right = []
    for _ in range(num_images // 16):
        pixels, labels = draw_mosaics(design, split, 16, generator)
        segments = torch.randint(design.num_segments, (16, 6), generator=generator)
        answers = answer_ids(design, labels, segments)
        text = torch.cat([question_ids(design, segments, generator), answers[..., :-1]], -1)
        features = vision_features(model, pixels.to(device))
        logits = text_logits(model, features, None, text.to(device))
        right.append(answer_loss(logits, answers.to(device), first_weight=1.0)[1].flatten(0, 1))
    digits = torch.cat(right).cpu().float()
    return {
        "exact_match": round(digits.min(1).values.mean().item(), 4),
        "digit_accuracy": round(digits.mean().item(), 4),
        "per_digit": [round(x, 4) for x in digits.mean(0).tolist()],
        "questions": len(digits),
    }


def train(
    design: Design,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    out: Path,
    *,
    max_steps: int | None = None,
) -> Trainer:
    """Train to the end or for `max_steps`, from where the folder's state is.

    Returns:
        The trainer; its state is in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(design, recipe, seed, device)
    if (out / STATE).exists():
        trainer.load(out / STATE)
    steps, before, start = 0, trainer.progress.seconds, time.monotonic()
    with tqdm(unit="step", mininterval=5, dynamic_ncols=True) as bar:
        while not trainer.is_done and (max_steps is None or steps < max_steps):
            where = (trainer.progress.phase, trainer.progress.stage)
            shown = trainer.advance()
            steps += 1
            trainer.progress.seconds = before + time.monotonic() - start
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
            bar.set_description(_describe(trainer), refresh=False)
            moved = where != (trainer.progress.phase, trainer.progress.stage)
            if moved or trainer.progress.step % recipe.save_every == 0:
                line = {name: round(value, 3) for name, value in shown.items()}
                bar.write(f"{_describe(trainer)} {line} {trainer.progress.seconds:.0f} s")
                trainer.save(out / STATE)
    trainer.save(out / STATE)
    return trainer


def _describe(trainer: Trainer) -> str:
    progress = trainer.progress
    if progress.phase == CURRICULUM:
        stage = trainer.recipe.stages[progress.stage]
        return f"{progress.phase} {stage} step {progress.step}"
    return f"{progress.phase} step {progress.step}"


def write_checkpoint(trainer: Trainer, out: Path, command: str) -> dict[str, Any]:
    """Write the model in bfloat16, measure what was written, and write the metrics.

    Returns:
        The metrics.
    """
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    model.to(trainer.device)
    progress = trainer.progress
    metrics = {
        "command": command,
        "design": dataclasses.asdict(trainer.design),
        "recipe": dataclasses.asdict(trainer.recipe),
        "seed": trainer.seed,
        "validation": measure(model, trainer.design, "validation"),
        "test": measure(model, trainer.design, "test"),
        "steps": {"alignment": trainer.recipe.alignment_steps, "after": progress.total},
        "stages": progress.curve,
        "seconds": round(progress.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one model; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--design", choices=sorted(DESIGNS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if (args.out / METRICS).exists():
        print(f"{args.out} holds a finished run")
        return 0
    device = choose_device(args.device)
    trainer = train(DESIGNS[args.design], RECIPES[args.design], args.seed, device, args.out)
    command = f"python -m bench.fidelity.train --design {args.design} --seed {args.seed}"
    metrics = write_checkpoint(trainer, args.out, command)
    (args.out / STATE).unlink()
    for split in ("validation", "test"):
        print(f"{split}: {metrics[split]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
