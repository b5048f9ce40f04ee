"""Accuracy under a KV budget: `python -m bench.fidelity.evaluate --checkpoint DIR --methods all`.

Every method goes through `kvevict.evict(model, policy)`, as a user's would. The first token of an
answer comes from the whole prompt, all others from what was kept of it.

A method is a name of `kvevict.policies.list(with_keep=True)`, with the fields that are not the
defaults behind it: `snapkv`, `snapkv/window=4/pool_kernel=1`; `all` is every name. Beside them
stand controls: the full cache, all vision tokens removed, all needed ones removed, random ones
kept, the needed ones kept ("oracle").

With `--model` and `--questions FILE` the same loop runs on a real checkpoint. A line of the file is
{"image": path, "question": str, "answer": str or [str]}; paths are relative to the file.
"""

from __future__ import annotations

import argparse
import ast
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kvevict
from bench.fidelity.controls import Oracle, RandomVision, Without
from bench.fidelity.data import PIXEL_MEAN, PIXEL_STD
from bench.fidelity.questions import Batch, Task, load_mosaics, load_questions
from bench.fidelity.tables import Row, write_json, write_tables
from bench.fidelity.train import choose_device
from kvevict import policies
from kvevict.demo import picture_of
from kvevict.integrations.transformers import EvictionReport
from kvevict.plotting import plot_comparison
from kvevict.policies._lists import in_list

Z_95 = 1.959964
PICTURE_BUDGET = 0.1


@dataclass(frozen=True)
class Method:
    """Something to measure.

    Attributes:
        name: as it stands in the tables.
        build: makes the policy for a budget and a batch; None is the full cache.
        has_budget: whether budgets mean anything to it.
    """

    name: str
    build: Callable[[float, Batch], Any]
    has_budget: bool = True


@dataclass
class Tally:
    """What was counted of one method at one budget, one entry per question.

    Attributes:
        right: whether the whole answer is.
        part: how much of it is.
        kept: the measured fraction of keys that stay behind the prompt.
        recall: the fraction of needed tokens kept, per layer; empty where they are unknown.
    """

    right: list[bool] = field(default_factory=list)
    part: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    recall: list[list[float]] = field(default_factory=list)


def parse_method(text: str) -> Method:
    """Read `name/field=value/…`.

    Raises:
        ValueError: if there is no policy of that name.
        TypeError: if it has no such field.
    """
    name, *settings = text.split("/")
    fields: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    policies.get(name, keep=1.0, **fields)
    return Method(text, lambda keep, _: policies.get(name, keep=keep, **fields))


def _oracle(keep: float, batch: Batch) -> Oracle:
    assert batch.needed is not None
    return Oracle(keep=keep, needed=batch.needed)


def control_methods(needs: bool) -> list[Method]:
    """Return the controls; some need to know the needed tokens."""
    always = [
        Method("full", lambda *_: None, has_budget=False),
        Method("text only", lambda *_: Without(), has_budget=False),
        Method("random vision", lambda keep, _: RandomVision(keep=keep)),
        Method("random vision per head", lambda keep, _: RandomVision(keep=keep, per_head=True)),
    ]
    if not needs:
        return always
    return [
        *always,
        Method("needed removed", lambda _, b: Without(removed=b.needed), has_budget=False),
        Method("oracle", _oracle),
    ]


@torch.inference_mode()
def ask(model: Any, batch: Batch, policy: Any) -> tuple[Tensor, EvictionReport | None]:
    """Generate greedily with what a policy keeps.

    Returns:
        New ids [batch_size, num_new], and what was kept; None where nothing went.
    """
    options = {"max_new_tokens": batch.num_new, "do_sample": False}
    prompt_len = batch.inputs["input_ids"].shape[1]
    if policy is None:
        return model.generate(**batch.inputs, **options)[:, prompt_len:], None
    with kvevict.evict(model, policy) as eviction:
        output = model.generate(**batch.inputs, **options)
    return output[:, prompt_len:], eviction.report


def measure(task: Task, method: Method, budget: float) -> Tally:
    """Ask all questions of a task."""
    tally = Tally()
    for batch in task.batches:
        generated, report = ask(task.model, batch, method.build(budget, batch))
        layers = report.kept if report else ()
        right, part = task.score(generated, batch.answers)
        tally.right += right.tolist()
        tally.part += part.tolist()
        lens = batch.inputs["attention_mask"].sum(1).double()
        fractions = [layer.kept_lens.double().mean(1) / lens for layer in layers]
        tally.kept += torch.stack(fractions).mean(0).tolist() if layers else [1.0] * len(lens)
        if batch.needed is None:
            continue
        recalls = [recall(layer.kept_indices, batch.needed) for layer in layers]
        everything = [1.0] * task.model.config.get_text_config().num_hidden_layers
        tally.recall += torch.stack(recalls, 1).tolist() if layers else [everything] * len(lens)
    return tally


def mark_needed(task: Task, batch: Batch) -> Tensor:
    """Return the first mosaic [height, width, 3] in [0, 1]; the digits asked for are red."""
    assert batch.needed is not None
    pixels = batch.inputs["pixel_values"][0, 0].cpu() * PIXEL_STD + PIXEL_MEAN
    rows, columns = grid_of(task)
    asked = batch.needed[0, 1 : 1 + rows * columns].view(rows, columns).cpu()
    enlarged = asked.repeat_interleave(len(pixels) // rows, 0)
    enlarged = enlarged.repeat_interleave(len(pixels) // columns, 1)
    others = pixels.where(~enlarged, 0.3 * pixels)
    return torch.stack([pixels, others, others], -1).clamp(0, 1)


def grid_of(task: Task) -> tuple[int, int]:
    """Return rows and columns of a mosaic's vision tokens."""
    side = math.isqrt(task.model.config.image_seq_length)
    return side, side


def draw_kept(task: Task, methods: Sequence[Method], budget: float, path: Path) -> None:
    """Draw what methods keep of the first mosaic as a PNG; the digits asked for are red."""
    first = task.batches[0].first(1)
    pictures = {}
    for method in methods:
        _, report = ask(task.model, first, method.build(budget, first))
        if report is not None:
            layers = [picture_of(layer, report, grid_of(task)) for layer in report.kept]
            pictures[method.name] = layers
    plot_comparison(
        mark_needed(task, first),
        pictures,
        path,
        prompt_len=first.inputs["input_ids"].shape[1],
        title=f"What is kept at {budget:.0%}",
        subtitle=f"{task.name}, first question; the digits that are asked for are red.",
        image_name="the mosaic",
    )


def recall(kept_indices: Tensor, needed: Tensor) -> Tensor:
    """Return the fraction of needed tokens kept [batch_size], the mean over lists.

    Args:
        kept_indices: [batch_size, num_lists, k].
        needed: [batch_size, prompt_len] bool.
    """
    kept = in_list(kept_indices, needed.shape[1]) & needed[:, None]
    return kept.sum(2).double().mean(1) / needed.sum(1)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` trials (Wilson 1927)."""
    z2 = Z_95**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, center - half), min(1.0, center + half)


def summarize(checkpoint: str, method: Method, budget: float, tally: Tally) -> Row:
    """Turn counts into a line of the result."""
    count = len(tally.right)
    share = sum(tally.right) / count
    part = torch.tensor(tally.part, dtype=torch.float64)
    mean = part.mean().item()
    half = Z_95 * part.std(correction=min(1, count - 1)).item() / math.sqrt(count)
    return Row(
        checkpoint=checkpoint,
        method=method.name,
        budget=budget if method.has_budget else None,
        exact_match=share,
        exact_match_interval=wilson(share, count),
        token_accuracy=mean,
        token_accuracy_interval=(max(0.0, mean - half), min(1.0, mean + half)),
        kept=sum(tally.kept) / count,
        recall=[sum(layer) / count for layer in zip(*tally.recall, strict=True)],
        questions=count,
    )


def measure_all(task: Task, methods: Sequence[Method], budgets: Sequence[float]) -> Iterator[Row]:
    """Measure every method at every budget, controls first."""
    runs = [
        (method, budget)
        for method in (*control_methods(task.needs), *methods)
        for budget in (budgets if method.has_budget else (1.0,))
    ]
    for method, budget in tqdm(runs, desc=task.name, unit="run"):
        yield summarize(task.name, method, budget, measure(task, method, budget))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, nargs="+", metavar="DIR", help="trained here")
    which.add_argument("--model", metavar="DIR_OR_ID", help="any vision-language checkpoint")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines for --model")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an answer of --model")
    parser.add_argument("--methods", default="all", help="names with commas, or all (default)")
    parser.add_argument("--budgets", default=".02,.05,.1,.2,.5,1", help="fractions of the prompt")
    parser.add_argument("--n", type=int, default=512, help="questions")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    parser.add_argument("--out", type=Path, default=Path("fidelity-out"), metavar="DIR")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.questions is None):
        parser.error("--model and --questions go together")
    every = policies.list(with_keep=True)
    names = [n for text in args.methods.split(",") for n in (every if text == "all" else [text])]
    try:
        args.methods = [parse_method(name) for name in dict.fromkeys(names) if name]
        args.budgets = [float(text) for text in args.budgets.split(",")]
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write tables and plots; return the exit status."""
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "bench.fidelity.evaluate", *(argv or sys.argv[1:])])
    device = choose_device(args.device)
    if args.model is not None:
        loaders = [
            partial(load_questions, args.model, args.questions, args.n, args.new_tokens, device)
        ]
    else:
        loaders = [
            partial(load_mosaics, dir, args.split, args.n, device) for dir in args.checkpoint
        ]
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for i, load in enumerate(loaders):
        task = load()
        if i == 0 and task.needs:
            budget = min(args.budgets, key=lambda budget: abs(budget - PICTURE_BUDGET))
            draw_kept(task, args.methods, budget, args.out / "kept.png")
        for row in measure_all(task, args.methods, args.budgets):
            rows.append(row)
            write_json([command], rows, args.out / "fidelity.json")
    print(write_tables([command], rows, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
