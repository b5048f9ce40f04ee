"""See it work: `python -m kvevict.demo`.

Answers a question about a photo twice, with the full and with an evicted KV cache, and reports
what was kept, how much memory and time it took, and how far the outputs agree. `--compare` does so
for several policies at the same budget, side by side.

Without `--model` a small LLaVA with seeded random weights is built on the spot, nothing is
downloaded; sizes, budgets and timings are real, its words would not be, so it has none.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvevict import policies
from kvevict.plotting import (
    LayerPicture,
    plot_comparison,
    plot_kept_patches,
    require_matplotlib,
)
from kvevict.policies import IMAGE, VIDEO, LayerPolicy, PrefillPolicy

if TYPE_CHECKING:
    from kvevict.integrations.transformers import EvictionReport, KeptLayer

QUESTION = "What is in this picture?"
NUM_QUESTION_TOKENS = 8
NUM_ROUNDS = 2
IMAGE_TOKEN_ID = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    args = parse_args(argv)
    if not has_extras("kvevict.demo", "transformers", "PIL"):
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        run_demo(args, Progress())
    return 0


def has_extras(program: str, *modules: str) -> bool:
    """Return whether matplotlib and the modules are there; print what to install if not."""
    try:
        require_matplotlib()
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        print(f'{program}: {error}\nInstall what it needs: pip install "kvevict[demo]"')
        return False
    return True


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m kvevict.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="checkpoint of a vision-language model"
    )
    parser.add_argument("--image", metavar="FILE", type=Path, help="photo to ask about")
    parser.add_argument("--question", default=QUESTION, help="asked where --model has a tokenizer")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--policy", choices=policies.list(), default="tgv_kv", metavar="NAME", help=name_policies()
    )
    which.add_argument(
        "--compare", type=parse_names, metavar="NAME,NAME,…", help="several of them side by side"
    )
    parser.add_argument(
        "--keep", type=parse_keep, default=0.05, help="ratio (0.05) or tokens per layer (64)"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("kvevict-demo"), metavar="DIR")
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2")
    if args.image is not None and not args.image.is_file():
        parser.error(f"--image: there is no file {args.image}")
    return args


def name_policies() -> str:
    """Return the names of all policies for the help."""
    return f"one of {', '.join(policies.list())}"


def parse_names(text: str) -> list[str]:
    """Read names of policies."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in policies.list():
            raise argparse.ArgumentTypeError(f"{name!r} is not {name_policies()}")
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is named twice")
    return names


def parse_keep(text: str) -> float | int:
    """Read a ratio or a number of tokens."""
    value = int(text) if text.isdigit() else float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


class Progress:
    """Numbered steps on the screen."""

    def __init__(self, num_steps: int = 4) -> None:
        self.num_steps = num_steps
        self.step = 0

    def __call__(self, text: str) -> None:
        """Announce the next step."""
        self.step += 1
        print(f"[{self.step}/{self.num_steps}] {text}", flush=True)

    def note(self, text: str) -> None:
        """Add a line to the current step."""
        print(f"      {text}", flush=True)

    def tick(self, done: int, total: int) -> None:
        """Show how far a loop is, on a terminal only."""
        if sys.stdout.isatty():
            end = "\r" if done < total else "\r" + " " * 40 + "\r"
            print(f"      token {done}/{total}", end=end, flush=True)


@dataclass(frozen=True, eq=False)
class Task:
    """A model and a prompt with one image.

    Attributes:
        model: a Hugging Face model.
        inputs: arguments of its forward.
        photo: [height, width, 3] float in [0, 1], what the vision tower saw.
        grid: rows and columns of image tokens, None where they are no plain grid.
        decode: token ids to text, None without a tokenizer.
    """

    model: Any
    inputs: dict[str, Tensor]
    photo: Tensor
    grid: tuple[int, int] | None
    decode: Callable[[Tensor], str] | None = None


@dataclass(eq=False)
class Run:
    """Measurements of one way to answer.

    Attributes:
        prefill_s: seconds until the first token, eviction included; one per answer.
        decode_s: seconds per further token, the median of each answer.
        tokens: [num_new] the greedy choice at each step.
        logits: [num_new, vocab_size] float32.
        kv_bytes: bytes of the cache after the prompt.
        peak_bytes: peak memory while it ran, None where it cannot be told.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    kv_bytes: int = 0
    peak_bytes: int | None = None


@dataclass(eq=False)
class Contestant:
    """A policy and what came of it.

    Attributes:
        name: in the registry.
        policy: what evicts.
        run: measurements.
        reports: what was kept, one per answer.
        own_words: [num_new] tokens of an answer that follows its own choices.
    """

    name: str
    policy: PrefillPolicy | LayerPolicy
    run: Run = field(default_factory=Run)
    reports: list[EvictionReport] = field(default_factory=list)
    own_words: Tensor | None = None

    @property
    def title(self) -> str:
        """The name of the method."""
        return type(self.policy).__name__

    @property
    def report(self) -> EvictionReport:
        """What the last answer kept."""
        return self.reports[-1]


def run_demo(args: argparse.Namespace, say: Progress) -> None:
    """Build, run the full cache and every policy, report."""
    names = args.compare or [args.policy]
    contestants = [Contestant(name, make_policy(name, args.keep)) for name in names]
    task = build_task(args, say)
    prompt_len = task.inputs["input_ids"].shape[1]
    say("Warming up")
    answer(task, 2, Run(), say)

    say(f"Answering in turn with the full and the evicted cache, {NUM_ROUNDS} rounds")
    say.note(f"{prompt_len} prompt tokens, then {args.new_tokens} new ones")
    full = measure_in_turn(task, args.new_tokens, contestants, say)

    say("Results")
    if len(contestants) == 1:
        print_kept(contestants[0].report)
        print_comparison(task, full, contestants[0])
    else:
        print_side_by_side(task, full, contestants)
    if task.decode is not None:
        print_words(task.decode, full, contestants)
    if task.grid is None:
        print("\nNo picture: the image tokens of this model are no plain grid.")
        return
    print(f"\nPicture: {draw(args, task, task.grid, contestants).resolve()}")


def make_policy(name: str, keep: float | int) -> PrefillPolicy | LayerPolicy:
    """Return the policy with its budget, if it takes one."""
    has_keep = name in policies.list(with_keep=True)
    return policies.get(name, keep=keep) if has_keep else policies.get(name)


def measure_in_turn(
    task: Task, num_new: int, contestants: Sequence[Contestant], say: Progress
) -> Run:
    """Answer with the full cache and with every policy, in turn; return the full cache's run."""
    from kvevict.integrations.transformers import evict

    full = Run()
    width = max(len("full"), *(len(c.title) for c in contestants))
    for one in contestants:
        say.note(f"{one.policy}")
    for _ in range(NUM_ROUNDS):
        measure(task, num_new, full, say)
        say.note(f"{'full'.ljust(width)} : {speed_of(full)}")
        for one in contestants:
            with evict(task.model, one.policy) as eviction:
                measure(task, num_new, one.run, say, follow=full.tokens)
            one.reports += eviction.reports
            say.note(f"{one.title.ljust(width)} : {speed_of(one.run)}")
    for one in contestants:
        if task.decode is not None:
            with evict(task.model, one.policy):
                one.own_words = answer(task, num_new, Run(), say).tokens
    return full


def draw(
    args: argparse.Namespace,
    task: Task,
    grid: tuple[int, int],
    contestants: Sequence[Contestant],
) -> Path:
    """Write the picture of one policy, or of several side by side; return its path."""
    pictures = [
        [picture_of(layer, one.report, grid) for layer in one.report.kept] for one in contestants
    ]
    prompt_len = task.inputs["input_ids"].shape[1]
    if len(contestants) == 1:
        (one,) = contestants
        return plot_kept_patches(
            task.photo,
            pictures[0],
            args.out / f"kept_{one.name}.png",
            prompt_len=prompt_len,
            title=title_of(one),
            subtitle=subtitle_of(args, one.report),
        )
    return plot_comparison(
        task.photo,
        {one.title: layers for one, layers in zip(contestants, pictures, strict=True)},
        args.out / "compared.png",
        prompt_len=prompt_len,
        title="What is kept of the photo",
        subtitle=f"{model_of(args)}, keep = {args.keep}. Brightness: the share of layers and KV "
        "heads that keep a patch.",
    )


# The model and its prompt


def build_task(args: argparse.Namespace, say: Progress) -> Task:
    """Load the checkpoint, or build the demo model, and make the prompt."""
    if args.model is not None:
        return load_task(args.model, args.image, args.question, say)
    say("Building a small LLaVA with seeded random weights (no download)")
    model = build_demo_model()
    num_parameters = sum(p.numel() for p in model.parameters())
    text, vision = model.config.text_config, model.config.vision_config
    say.note(
        f"{num_parameters / 1e6:.1f}M parameters, {text.num_hidden_layers} text layers, "
        f"{text.num_attention_heads} query and {text.num_key_value_heads} KV heads of "
        f"{text.head_dim}"
    )
    say.note("random weights: what is kept follows the photo, but means nothing")
    photo = square_photo(load_image(args.image), vision.image_size)
    rows = vision.image_size // vision.patch_size
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(10, text.vocab_size, (NUM_QUESTION_TOKENS,), generator=generator)
    input_ids = torch.cat([torch.tensor([1]), torch.full((rows * rows,), IMAGE_TOKEN_ID), question])
    say.note(
        f"prompt: 1 start token, {rows * rows} image tokens, {NUM_QUESTION_TOKENS} random ids in "
        "place of a question (there is no tokenizer)"
    )
    mean = photo.mean((0, 1))
    pixels = (photo - mean) / photo.std()
    inputs = {"input_ids": input_ids[None], "pixel_values": pixels.permute(2, 0, 1)[None]}
    return Task(model, inputs, photo, (rows, rows))


def build_demo_model() -> Any:
    """Return a LLaVA of 20M parameters with 576 image tokens and seeded random weights.

    The weights are larger than a training run would start from, or else attention would be
    uniform and every patch as good as any other. Equal biases of queries and keys, of another
    size in every layer, let some layers look nearby and others far, as trained ones do. Embeddings
    of size 1 and small residual branches tie the next token to the last one first.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=256,
    )
    text = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.06,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    layers = model.get_decoder().layers
    order = torch.randperm(len(layers), generator=generator)
    sizes = torch.linspace(0, 2.4, len(layers))[order]
    group_size = text.num_attention_heads // text.num_key_value_heads
    model.get_input_embeddings().weight.data *= 1 / text.initializer_range
    for layer, size in zip(layers, sizes, strict=True):
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.weight.data *= (2 * len(layers)) ** -0.5
        bias = size * torch.randn(text.num_key_value_heads, text.head_dim, generator=generator)
        layer.self_attn.k_proj.bias.data = bias.flatten()
        layer.self_attn.q_proj.bias.data = bias.repeat_interleave(group_size, 0).flatten()
    return model


def load_task(name: str, image_file: Path | None, question: str, say: Progress) -> Task:
    """Load a checkpoint with its processor, and ask about the photo."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    say(f"Loading {name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()
    image = load_image(image_file)
    inputs = dict(
        processor(images=image, text=prompt_text(processor, question), return_tensors="pt").to(
            device, model.dtype
        )
    )
    say.note(f"{type(model).__name__}, {inputs['input_ids'].shape[1]} prompt tokens on {device}")
    photo, grid = locate_patches(model, inputs, image)

    def decode(tokens: Tensor) -> str:
        return str(processor.decode(tokens, skip_special_tokens=True))

    return Task(model, inputs, photo, grid, decode)


def prompt_text(processor: Any, question: str) -> str:
    """Return the prompt of a question about one image, in the processor's template if any."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return str(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        )
    return f"USER: <image>\n{question} ASSISTANT:"


def locate_patches(
    model: Any, inputs: dict[str, Tensor], image: Any
) -> tuple[Tensor, tuple[int, int] | None]:
    """Return the photo as the tower saw it and the rows and columns of its tokens."""
    config = model.config
    names = ("image_token_id", "image_token_index")
    token_ids = [i for i in (getattr(config, name, None) for name in names) if i is not None]
    count = int(torch.isin(inputs["input_ids"], inputs["input_ids"].new_tensor(token_ids)).sum())
    grid: tuple[int, int] | None = None
    pixels = inputs["pixel_values"]
    photo = to_tensor(image)
    if "image_grid_thw" in inputs:
        merge = config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        grid = (rows // merge, columns // merge)
    elif pixels.dim() == 4 and len(pixels) == 1:
        side = round(count**0.5)
        grid = (side, side)
        photo = pixels[0].float().permute(1, 2, 0).cpu()
        photo = (photo - photo.amin((0, 1))) / (photo.amax((0, 1)) - photo.amin((0, 1))).clamp(1e-6)
    if grid is not None and grid[0] * grid[1] != count:
        grid = None
    return photo, grid


def load_image(file: Path | None) -> Any:
    """Open a photo; scikit-learn ships the default one."""
    from PIL import Image

    if file is not None:
        return Image.open(file).convert("RGB")
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise SystemExit(
            'kvevict.demo: the default photo comes with scikit-learn: pip install "kvevict[demo]", '
            "or pass --image FILE"
        ) from error
    return Image.fromarray(load_sample_image("china.jpg"))


def to_tensor(image: Any) -> Tensor:
    """Return [height, width, 3] float in [0, 1]."""
    width, height = image.size
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).float() / 255


def square_photo(image: Any, size: int) -> Tensor:
    """Crop the middle and scale it to [size, size, 3]."""
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    return to_tensor(image.crop((left, top, left + side, top + side)).resize((size, size)))


# Running it


def measure(
    task: Task, num_new: int, run: Run, say: Progress, follow: Tensor | None = None
) -> None:
    """Answer once more and add what was measured to the run.

    Args:
        task: what to answer.
        num_new: number of tokens.
        run: where to add.
        say: where to show progress.
        follow: [num_new] tokens to feed instead of the model's own, so that two runs can be
            compared step by step.
    """
    device = task.model.device
    reset_peak_memory(device)
    answer(task, num_new, run, say, follow)
    peak = read_peak_memory(device)
    if peak is not None:
        run.peak_bytes = max(peak, run.peak_bytes or 0)


def speed_of(run: Run) -> str:
    """Describe the last answer."""
    return (
        f"first token after {run.prefill_s[-1] * 1e3:.0f} ms, then "
        f"{1 / run.decode_s[-1]:.1f} tokens/s"
    )


def prefill(task: Task, run: Run) -> Any:
    """Run the prompt and note the time."""
    start = clock(task.model.device)
    output = task.model(**task.inputs, use_cache=True, logits_to_keep=1)
    run.prefill_s.append(clock(task.model.device) - start)
    return output


def answer(task: Task, num_new: int, run: Run, say: Progress, follow: Tensor | None = None) -> Run:
    """Answer greedily, one token at a time."""
    from kvevict.integrations.transformers import report

    output = prefill(task, run)
    cache = output.past_key_values
    run.kv_bytes = report(cache).bytes_stored
    logits = [output.logits[0, -1].float()]
    times = []
    for step in range(num_new - 1):
        token = logits[-1].argmax() if follow is None else follow[step]
        start = clock(task.model.device)
        output = task.model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        times.append(clock(task.model.device) - start)
        logits.append(output.logits[0, -1].float())
        say.tick(step + 2, num_new)
    run.decode_s.append(statistics.median(times))
    run.logits = torch.stack(logits)
    run.tokens = run.logits.argmax(-1)
    return run


def clock(device: torch.device) -> float:
    """Return the time when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Start to watch the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def read_peak_memory(device: torch.device) -> int | None:
    """Return the peak since the reset: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else None


# Reporting


def count_kept(layer: KeptLayer, report: EvictionReport) -> tuple[float, float]:
    """Return image and other tokens kept by one layer, the mean over its lists."""
    columns = layer.kept_indices[0]
    modality = report.modality[0][columns.clamp(min=0).long()]
    num_image = float((is_vision(modality) & (columns >= 0)).sum(-1).float().mean())
    return num_image, float(layer.kept_lens[0].float().mean()) - num_image


def is_vision(modality: Tensor) -> Tensor:
    """Return where a token is of an image or a video."""
    return torch.isin(modality, modality.new_tensor([IMAGE, VIDEO]))


def count_prompt(report: EvictionReport) -> tuple[int, int]:
    """Return image and other tokens of the prompt."""
    modality = report.modality[0]
    num_vision = int(is_vision(modality).sum())
    return num_vision, int((modality >= 0).sum()) - num_vision


def mean_counts(report: EvictionReport) -> tuple[float, float]:
    """Return image and other tokens kept, the mean over layers and their lists."""
    counts = [count_kept(layer, report) for layer in report.kept]
    return statistics.mean(n for n, _ in counts), statistics.mean(n for _, n in counts)


def print_kept(report: EvictionReport) -> None:
    """Print tokens kept per layer and modality."""
    num_vision, num_text = count_prompt(report)
    rows = []
    for layer in report.kept:
        image, text = count_kept(layer, report)
        share = (image + text) / (num_vision + num_text)
        bar = "█" * max(1, round(24 * share / max_share(report)))
        rows.append([str(layer.layer_idx), f"{image:.0f}", f"{text:.0f}", f"{share:6.1%}", bar])
    print_table(["layer", f"image of {num_vision}", f"text of {num_text}", "kept", ""], rows)


def max_share(report: EvictionReport) -> float:
    """Return the largest share of the prompt that a layer keeps."""
    total = int((report.modality[0] >= 0).sum())
    return max(float(layer.kept_lens[0].float().mean()) / total for layer in report.kept)


def agreement_of(full: Run, run: Run) -> tuple[float, float, float]:
    """Return the share of equal next tokens, and the mean and the least cosine of logits."""
    cosine = torch.cosine_similarity(full.logits, run.logits, dim=-1)
    same = full.tokens.eq(run.tokens).float().mean()
    return float(same), float(cosine.mean()), float(cosine.min())


def print_comparison(task: Task, full: Run, one: Contestant) -> None:
    """Print memory, speed and agreement, full cache next to evicted cache."""
    prompt_len = task.inputs["input_ids"].shape[1]
    run, report = one.run, one.report

    def sizes(name: str, before: int, after: int) -> list[str]:
        return [name, mib(before), mib(after), f"{after / before:.2f}x" if before else ""]

    def speeds(name: str, before: float, after: float, digits: int) -> list[str]:
        return [name, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after / before:.2f}x"]

    rows = [
        sizes("KV cache after the prompt", full.kv_bytes, run.kv_bytes),
        sizes("KV cache, peak of the prompt", report.bytes_before, report.bytes_peak),
    ]
    if full.peak_bytes is not None and run.peak_bytes is not None:
        on_cpu = task.model.device.type == "cpu"
        name = "peak memory of the process" if on_cpu else "peak GPU memory"
        rows.append(sizes(name, full.peak_bytes, run.peak_bytes))
    prefill = [prompt_len / min(r.prefill_s) for r in (full, run)]
    decode = [1 / min(r.decode_s) for r in (full, run)]
    rows.append(speeds("prefill, tokens/s", prefill[0], prefill[1], 0))
    rows.append(speeds("decode, tokens/s", decode[0], decode[1], 1))
    same, mean, worst = agreement_of(full, run)
    rows.append(["next-token agreement", "", f"{same:.0%}", f"of {len(full.tokens)}"])
    rows.append(["logit cosine, mean (worst)", "", f"{mean:.3f}", f"({worst:.3f})"])
    print_table(["", "full", "evicted", ""], rows)
    print_caveats(task)


def print_side_by_side(task: Task, full: Run, contestants: Sequence[Contestant]) -> None:
    """Print one row per cache."""
    prompt_len = task.inputs["input_ids"].shape[1]

    def cells(name: str, run: Run, image: float, text: float, agreement: list[str]) -> list[str]:
        prefill, decode = prompt_len / min(run.prefill_s), 1 / min(run.decode_s)
        counts = [f"{image:.1f}", f"{text:.1f}"]
        return [name, *counts, mib(run.kv_bytes), f"{prefill:.0f}", f"{decode:.1f}", *agreement]

    rows = [cells("full", full, *count_prompt(contestants[0].report), ["", "", ""])]
    for one in contestants:
        same, mean, worst = agreement_of(full, one.run)
        agreement = [f"{same:.0%}", f"{mean:.3f}", f"{worst:.3f}"]
        rows.append(cells(one.title, one.run, *mean_counts(one.report), agreement))
    print_table(
        ["", "image", "text", "KV cache", "prefill/s", "decode/s", "agreement", "cosine", "worst"],
        rows,
    )
    print(
        "image, text: tokens kept, the mean over layers and their lists. prefill, decode: tokens/s."
    )
    print(f"agreement: of {len(full.tokens)} next tokens. cosine: of the logits, mean and worst.")
    print_caveats(task)


def print_caveats(task: Task) -> None:
    """Print what to make of the numbers."""
    print(f"Speeds are the better of {NUM_ROUNDS} rounds; other processes change them.")
    print("Agreement: the evicted cache is fed the tokens that the full cache chose.")
    if task.decode is None:
        print("Random weights spread attention over the whole photo, which is hard on agreement;")
        print("and in a model this small the weights, not the cache, set the decoding speed.")


def print_words(
    decode: Callable[[Tensor], str], full: Run, contestants: Sequence[Contestant]
) -> None:
    """Print what each cache answers."""
    words = {"full cache": full.tokens}
    words |= {one.title: one.own_words for one in contestants if one.own_words is not None}
    width = max(map(len, words))
    print()
    for name, tokens in words.items():
        print(f"{name.ljust(width)} : {decode(tokens)!r}")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns, the first and an unnamed last to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        last = len(cells) - 1 if not head[-1] else 0
        parts = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "   ".join(parts).rstrip()

    print("\n" + line(head))
    print("  " + "─" * (sum(widths) + 3 * (len(widths) - 1)))
    for row in rows:
        print(line(row))
    print(flush=True)


def mib(count: float) -> str:
    """Format bytes."""
    return f"{count / 2**20:.2f} MiB" if count < 100 * 2**20 else f"{count / 2**20:.0f} MiB"


def picture_of(layer: KeptLayer, report: EvictionReport, grid: tuple[int, int]) -> LayerPicture:
    """Return which patches a layer keeps, as a fraction of its KV heads."""
    is_image = report.modality[0] == IMAGE
    votes = torch.zeros(len(is_image))
    columns = layer.kept_indices[0].flatten()
    columns = columns[columns >= 0].long().cpu()
    votes.index_add_(0, columns, torch.ones(len(columns)))
    patches = votes[is_image.cpu()].view(grid) / layer.kept_indices.shape[1]
    num_image, num_text = count_kept(layer, report)
    return LayerPicture(layer.layer_idx, patches, num_image, num_text)


def model_of(args: argparse.Namespace) -> str:
    """Return what to call the model."""
    return str(args.model or "small LLaVA with random weights")


def title_of(one: Contestant) -> str:
    """Return the headline of the picture."""
    share = one.report.bytes_after / one.report.bytes_before
    return f"{one.title} keeps {share:.1%} of the KV cache"


def subtitle_of(args: argparse.Namespace, report: EvictionReport) -> str:
    """Return the line below it."""
    brightness = "Evicted patches are dark."
    if report.kept[0].kept_indices.shape[1] > 1:
        brightness = "Brightness: the share of KV heads that keep a patch."
    return (
        f"{model_of(args)}, keep = {args.keep}; {mib(report.bytes_before)} of keys and values "
        f"become {mib(report.bytes_after)}. {brightness}"
    )


if __name__ == "__main__":
    sys.exit(main())
