"""Pictures of what an eviction kept: patches on the photo, budgets per layer.

Needs matplotlib, which `pip install "kvevict[demo]"` brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INK, MUTED, FAINT = "#1b1f2a", "#6b7280", "#e5e7eb"
ACCENT, TEXT_COLOR = "#ff9f1c", "#2d6a9f"
DIM = 0.22
"""Brightness of patches that were evicted."""


@dataclass(frozen=True, eq=False)
class LayerPicture:
    """What one layer kept.

    Attributes:
        layer_idx: index of the layer.
        patches: [rows, columns] float in [0, 1], the fraction of KV heads that keep each patch.
        num_image: image tokens kept, the mean over KV heads.
        num_text: other tokens kept, likewise.
    """

    layer_idx: int
    patches: Tensor
    num_image: float
    num_text: float


def plot_kept_patches(
    image: Tensor,
    layers: Sequence[LayerPicture],
    path: Path | str,
    *,
    prompt_len: int,
    title: str,
    subtitle: str = "",
    image_name: str = "the photo",
    num_shown: int = 4,
) -> Path:
    """Draw the kept patches of some layers on the photo, and the budgets of all, as a PNG.

    Args:
        image: [height, width, 3] float in [0, 1], as the model saw it.
        layers: every layer that was evicted, in order.
        path: the file to write.
        prompt_len: tokens of the prompt, for the percentages.
        title: headline.
        subtitle: a line below it.
        image_name: what to call the image.
        num_shown: layers drawn on the photo, spread evenly over the depth.

    Returns:
        The path.

    Raises:
        ImportError: if matplotlib is missing.
    """
    plt = _import_pyplot()
    shown = [layers[i] for i in _spread(len(layers), num_shown)]
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT}):
        figure = plt.figure(figsize=(13.6, 6.9), facecolor="white")
        grid = figure.add_gridspec(
            2,
            1,
            height_ratios=[1.0, 0.78],
            left=0.03,
            right=0.975,
            top=0.80,
            bottom=0.085,
            hspace=0.28,
        )
        photos = grid[0].subgridspec(1, len(shown) + 1, wspace=0.06)
        charts = grid[1].subgridspec(1, 2, width_ratios=[len(shown), 1.0], wspace=0.10)
        figure.text(0.03, 0.945, title, fontsize=19, fontweight="bold", va="center")
        figure.text(0.03, 0.893, subtitle, fontsize=10.5, color=MUTED, va="center")

        axes = figure.add_subplot(photos[0])
        num_patches = layers[0].patches.numel()
        _draw_photo(axes, image.numpy(), image_name, f"{num_patches} image tokens")
        for i, layer in enumerate(shown, start=1):
            axes = figure.add_subplot(photos[i])
            share = layer.num_image / num_patches
            caption = f"{layer.num_image:.0f} patches, {share:.1%}"
            _draw_photo(
                axes, _darken(image, layer.patches).numpy(), f"layer {layer.layer_idx}", caption
            )
            _outline(axes, image, layer.patches)
        _draw_budgets(figure.add_subplot(charts[0]), layers, prompt_len)
        _draw_votes(figure.add_subplot(charts[1]), image, layers)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return Path(path)


def plot_comparison(
    image: Tensor,
    methods: Mapping[str, Sequence[LayerPicture]],
    path: Path | str,
    *,
    prompt_len: int,
    title: str,
    subtitle: str = "",
    image_name: str = "the photo",
    num_columns: int = 5,
) -> Path:
    """Draw what several methods kept, and their budgets on one scale, as a PNG.

    Args:
        image: [height, width, 3] float in [0, 1], as the model saw it.
        methods: the layers of every method, by its name.
        path: the file to write.
        prompt_len: tokens of the prompt, for the percentages.
        title: headline.
        subtitle: a line below it.
        image_name: what to call the image.
        num_columns: at most this many methods in a row, the photo among them.

    Returns:
        The path.

    Raises:
        ImportError: if matplotlib is missing.
    """
    plt = _import_pyplot()
    num_cells = len(methods) + 1
    num_rows = math.ceil(num_cells / num_columns)
    columns = math.ceil(num_cells / num_rows)
    # Inches: every row has photos and, below them, charts.
    photo, chart, gap, head = 2.6, 1.25, 0.62, 1.05
    width, height = columns * (photo + 0.25) + 0.5, head + num_rows * (photo + chart + gap)
    highest = max(max(_totals(layers)) for layers in methods.values())
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT}):
        figure = plt.figure(figsize=(width, height), facecolor="white")
        figure.text(
            0.36 / width, 1 - 0.38 / height, title, fontsize=19, fontweight="bold", va="center"
        )
        figure.text(
            0.36 / width, 1 - 0.76 / height, subtitle, fontsize=10.5, color=MUTED, va="center"
        )

        def place(cell: int, below: float, tall: float) -> Any:
            """Add axes to a cell, `below` inches under its top."""
            row, column = divmod(cell, columns)
            left = 0.36 + column * (photo + 0.25)
            top = head + row * (photo + chart + gap) + below
            return figure.add_axes(
                (left / width, 1 - (top + tall) / height, photo / width, tall / height)
            )

        num_patches = next(iter(methods.values()))[0].patches.numel()
        _draw_photo(place(0, 0.25, photo), image.numpy(), image_name, f"{num_patches} tokens")
        for cell, (name, layers) in enumerate(methods.items(), start=1):
            votes = torch.stack([layer.patches for layer in layers]).mean(0)
            share = sum(_totals(layers)) / len(layers) / prompt_len
            pixels = _darken(image, votes / votes.max().clamp(min=1e-6)).numpy()
            axes = place(cell, 0.25, photo)
            _draw_photo(axes, pixels, name, f"{share:.1%} kept")
            _outline(axes, image, votes, linewidth=0.4)
            axes = place(cell, 0.25 + photo + 0.08, chart - 0.32)
            _draw_bars(axes, layers)
            axes.set_ylim(0, highest * 1.05)
            axes.tick_params(labelsize=7.5)
            if cell == 1:
                axes.legend(
                    frameon=False,
                    fontsize=9,
                    loc="center",
                    bbox_to_anchor=(-0.62, 0.5),
                    title="tokens per layer",
                    title_fontsize=9,
                )
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return Path(path)


def require_matplotlib() -> None:
    """Raise `ImportError`, with what to install, if pictures cannot be drawn."""
    _import_pyplot()


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'kvevict.plotting needs matplotlib: pip install "kvevict[demo]"'
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _spread(count: int, num_shown: int) -> list[int]:
    """Return `num_shown` indices from first to last."""
    if count <= num_shown:
        return list(range(count))
    return [round(i * (count - 1) / (num_shown - 1)) for i in range(num_shown)]


def _enlarge(patches: Tensor, image: Tensor) -> Tensor:
    """Repeat a value per patch [rows, columns] over its pixels [height, width, 1]."""
    size = (image.shape[0], image.shape[1])
    return torch.nn.functional.interpolate(patches[None, None].float(), size=size)[0, 0, :, :, None]


def _darken(image: Tensor, patches: Tensor) -> Tensor:
    """Show kept patches in color and the others dark, nearly gray, and blue-ish."""
    gray = image.mean(-1, keepdim=True) * torch.tensor([0.85, 0.95, 1.25])
    strength = _enlarge(patches.sqrt(), image)
    return (image * strength + DIM * gray * (1 - strength)).clamp(0, 1)


def _draw_photo(axes: Any, pixels: Any, name: str, caption: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(name, fontsize=12, fontweight="bold", loc="left", pad=6)
    axes.set_title(caption, fontsize=9.5, color=MUTED, loc="right", pad=6)


def _outline(axes: Any, image: Tensor, patches: Tensor, *, linewidth: float = 0.9) -> None:
    """Frame every kept patch."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    height, width = image.shape[0] / patches.shape[0], image.shape[1] / patches.shape[1]
    frames = [
        Rectangle((column * width - 0.5, row * height - 0.5), width, height)
        for row, column in (patches > 0).nonzero().tolist()
    ]
    axes.add_collection(
        PatchCollection(frames, facecolor="none", edgecolor=ACCENT, linewidth=linewidth)
    )


def _totals(layers: Sequence[LayerPicture]) -> list[float]:
    return [layer.num_text + layer.num_image for layer in layers]


def _draw_bars(axes: Any, layers: Sequence[LayerPicture]) -> None:
    """Stack text and image tokens per layer."""
    position = range(len(layers))
    text = [layer.num_text for layer in layers]
    vision = [layer.num_image for layer in layers]
    axes.bar(position, text, width=0.72, color=TEXT_COLOR, label="text")
    axes.bar(position, vision, width=0.72, bottom=text, color=ACCENT, label="image")
    axes.set_xticks(list(position), [str(layer.layer_idx) for layer in layers])
    axes.tick_params(length=0, labelcolor=MUTED, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_budgets(axes: Any, layers: Sequence[LayerPicture], prompt_len: int) -> None:
    """Draw the bars with their numbers and the mean."""
    totals = _totals(layers)
    mean = sum(totals) / len(totals)
    _draw_bars(axes, layers)
    axes.axhline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"mean {mean:.1f}\n{mean / prompt_len:.1%} of {prompt_len}",
        (len(layers) - 0.45, mean),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
        color=INK,
    )
    for x, total in enumerate(totals):
        axes.annotate(
            f"{total:.0f}",
            (x, total),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=MUTED,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_xlim(-0.6, len(layers) + 0.1 * len(layers))
    axes.set_ylim(0, max([*totals, 1]) * 1.22)
    axes.set_xlabel("layer", fontsize=9.5, color=MUTED)
    axes.set_title("tokens kept per layer", fontsize=12, fontweight="bold", loc="left", pad=6)
    axes.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.17))


def _draw_votes(axes: Any, image: Tensor, layers: Sequence[LayerPicture]) -> None:
    """Show how many layers keep each patch, over the dark photo."""
    votes = torch.stack([layer.patches for layer in layers]).sum(0)
    axes.imshow(_darken(image, torch.zeros_like(votes)).numpy())
    shown = votes.masked_fill(votes == 0, float("nan"))
    picture = axes.imshow(
        shown.numpy(),
        cmap="YlOrRd_r",
        alpha=0.92,
        interpolation="nearest",
        vmin=0,
        vmax=max(float(votes.max()), 1.0),
        extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5),
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("layers per patch", fontsize=12, fontweight="bold", loc="left", pad=6)
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
