"""See a trained model answer: `python -m bench.fidelity.demo`, which `make demo` runs.

Shows a committed checkpoint a mosaic of handwritten digits, asks for some of them, and compares the
answers from the full cache, from what a policy keeps of it, and from controls: as many tokens with
the vision tokens drawn at random, and those that show what is asked ("oracle"). Then it counts the
right answers to many questions, and draws what the policy kept.

Questions come from the test split in its order; none is chosen. `python -m kvevict.demo` shows any
other model, with timings.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvevict.demo import (
    Progress,
    has_extras,
    mib,
    parse_keep,
    picture_of,
    print_kept,
    print_table,
)
from kvevict.plotting import plot_kept_patches

if TYPE_CHECKING:
    from bench.fidelity.data import Design
    from bench.fidelity.evaluate import Method
    from bench.fidelity.questions import Task
    from kvevict.integrations.transformers import EvictionReport

POLICY = "grounded"
CHECKPOINT = Path(__file__).with_name("checkpoints") / "q-0"
CONTROLS = ("random vision", "oracle")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    if not has_extras("bench.fidelity.demo", "sklearn", "tqdm", "transformers"):
        return 1
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    run_demo(args, Progress(num_steps=3))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from bench.fidelity.evaluate import parse_method

    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="trained here"
    )
    parser.add_argument(
        "--policy", default=POLICY, metavar="NAME", help="of a policy, or NAME/field=value/…"
    )
    parser.add_argument(
        "--keep", type=parse_keep, default=0.05, help="ratio (0.05) or tokens per layer (64)"
    )
    parser.add_argument("--questions", type=int, default=64, metavar="N", help="how many to count")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR")
    args = parser.parse_args(argv)
    if args.questions < 1:
        parser.error("--questions must be at least 1")
    if not (args.checkpoint / "metrics.json").is_file():
        parser.error(f"--checkpoint: there is no file {args.checkpoint / 'metrics.json'}")
    try:
        args.policy = parse_method(args.policy)
    except (TypeError, ValueError) as error:
        parser.error(f"--policy: {error}")
    return args


def run_demo(args: argparse.Namespace, say: Progress) -> None:
    """Load, answer one question, count over many, draw."""
    from bench.fidelity.data import Design
    from bench.fidelity.evaluate import control_methods
    from bench.fidelity.questions import load_metrics, load_mosaics

    say(f"Loading {os.path.relpath(args.checkpoint)}")
    metrics = load_metrics(args.checkpoint)
    design = Design(**metrics["design"])
    task = load_mosaics(args.checkpoint, "test", args.questions, torch.device("cpu"))
    introduce(metrics, design, task, say)
    controls = {method.name: method for method in control_methods(task.needs)}
    methods = [controls["full"], args.policy, *(controls[name] for name in CONTROLS)]

    say("Asking the first question of the test split (not a chosen one)")
    answers, report = answer_first(args, design, task, methods, say)
    print_kept(report)

    say(f"Asking the first {args.questions} questions of the test split")
    print_counts(task, methods, args.keep)

    print(f"\nPicture: {draw(args, task, report, answers).resolve()}")


def introduce(metrics: dict[str, Any], design: Design, task: Task, say: Progress) -> None:
    """Say what the model is, where it comes from and what it is shown."""
    text = task.model.config.get_text_config()
    say.note(
        f"LLaVA of {metrics['parameters'] / 1e6:.1f}M parameters, {text.num_hidden_layers} text "
        f"layers, {text.num_attention_heads} query and {text.num_key_value_heads} KV heads of "
        f"{text.head_dim}"
    )
    say.note(
        f"trained from scratch in {metrics['seconds'] / 60:.0f} minutes, {metrics['device']}, "
        f"threads: {metrics['threads']}, by"
    )
    say.note(f"    {metrics['command']} --out DIR")
    say.note(
        f"prompt: 1 start token, a mosaic of {design.grid} x {design.grid} handwritten digits in "
        f"{design.num_vision} vision tokens ({design.cells**2} per digit), "
        f"{design.question_len} of a question"
    )


def answer_first(
    args: argparse.Namespace, design: Design, task: Task, methods: Sequence[Method], say: Progress
) -> tuple[str, EvictionReport]:
    """Print the first question and each method's answer.

    Returns:
        Question and answers in a line, and what the policy kept.
    """
    from bench.fidelity.data import answer_in_words, question_in_words
    from bench.fidelity.evaluate import ask

    first = task.batches[0].first(1)
    question = question_in_words(design, first.inputs["input_ids"][0, -design.question_len :])
    say.note(question)
    right: list[int] = first.answers[0]
    ids, reports = {}, {}
    for method in methods:
        generated, reports[method.name] = ask(task.model, first, method.build(args.keep, first))
        ids[method.name] = generated[0].tolist()
    report = reports[args.policy.name]
    assert report is not None
    rows = [["right", answer_in_words(right), "", "", ""]]
    for name, answer in ids.items():
        evicted = reports[name]
        stored = evicted.bytes_after if evicted else report.bytes_before
        hits = sum(ours == theirs for ours, theirs in zip(answer, right, strict=True))
        share = f"{stored / report.bytes_before:.1%}"
        rows.append([name, answer_in_words(answer), f"{hits} of {len(right)}", mib(stored), share])
    print_table(["", "answer", "digits right", "KV cache", "of full"], rows)
    if ids["full"] != right:
        print("The full cache is wrong here, too: what evicting costs, other questions tell.")
    print("The first digit is answered before anything is evicted.")
    print("random vision: all text and random vision tokens. oracle: all text, the vision tokens")
    print("that show what is asked, then random ones. Both keep as many tokens as the policy may.")
    print(f"\nWhat is kept by {args.policy.build(args.keep, first)}:", flush=True)
    whole, kept = (answer_in_words(ids[name]) for name in ("full", args.policy.name))
    return f"{question} Full cache: {whole}. {args.policy.name}: {kept}.", report


def print_counts(task: Task, methods: Sequence[Method], keep: float) -> None:
    """Print how many questions each method answers right."""
    from tqdm import tqdm

    from bench.fidelity.evaluate import measure, summarize

    rows = []
    for method in tqdm(methods, desc=task.name, unit="run", leave=False, disable=None):
        tally = measure(task, method, keep)
        row = summarize(task.name, method, keep, tally)
        low, high = row.exact_match_interval
        rows.append(
            [
                method.name,
                f"{sum(tally.right)} of {row.questions}",
                f"{row.exact_match:.1%}",
                f"{100 * low:.0f} to {100 * high:.0f}%",
                f"{row.token_accuracy:.1%}",
                f"{row.kept:.1%}",
                " / ".join(f"{100 * layer:.0f}" for layer in row.recall),
            ]
        )
    head = ["", "all digits right", "share", "95% interval", "later digits", "kept", "needed kept"]
    print_table(head, rows)
    print("later digits: the share of digits behind the first that are right.")
    print("needed kept: of the vision tokens that show what is asked, in % by layer.")


def draw(args: argparse.Namespace, task: Task, report: EvictionReport, answers: str) -> Path:
    """Write the picture of what the policy keeps of the first mosaic; return its path."""
    from bench.fidelity.evaluate import grid_of, mark_needed

    share = report.bytes_after / report.bytes_before
    return plot_kept_patches(
        mark_needed(task, task.batches[0]),
        [picture_of(layer, report, grid_of(task)) for layer in report.kept],
        args.out / "kept.png",
        prompt_len=report.modality.shape[1],
        title=f"{args.policy.name} keeps {share:.1%} of the KV cache",
        subtitle=f"{answers} Red digits: asked for. Dark: evicted.",
        image_name="the mosaic",
    )


if __name__ == "__main__":
    sys.exit(main())
