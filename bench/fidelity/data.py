"""Mosaics of handwritten digits, and questions that name a region of them.

An image is a `grid` x `grid` mosaic of 8 x 8 pixel digits. It is cut into segments: runs of `width`
digits within a row. A question names a segment by its row and first column, and the answer is its
digits from left to right:

    <bos> <image>*num_vision row R_r C_c filler*num_filler :   ->   d_1 ... d_width

So an answer needs `num_needed` vision tokens, all of them named before the first answer token, and
other ones for every step of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

DIGIT_PIXELS = 8
NUM_DIGITS = 10
PIXEL_MEAN, PIXEL_STD = 0.3, 0.37

PAD, BOS, IMAGE_ID = 0, 1, 2
FIRST_DIGIT = 4
ROW, COLON = 14, 15
FIRST_FILLER, NUM_FILLERS = 16, 8
FIRST_REGION = FIRST_FILLER + NUM_FILLERS
QUESTION_WORDS = 4
"""Tokens of a question without filler: row, R_r, C_c and the colon."""
LAST_REGION_WORD = 2
"""Where C_c stands in a question: from here on the region is known."""


@dataclass(frozen=True)
class Design:
    """The sizes of a task.

    Attributes:
        name: of the design.
        grid: digits per side of the mosaic.
        patch: pixels per side of a vision token; 8 is one token per digit, 4 is four.
        width: digits of an answer.
        num_filler: words without meaning between the region and the colon.
    """

    name: str
    grid: int
    patch: int
    width: int
    num_filler: int = 0

    @property
    def cells(self) -> int:
        """Vision tokens per side of a digit."""
        return DIGIT_PIXELS // self.patch

    @property
    def side(self) -> int:
        """Vision tokens per side of the image."""
        return self.grid * self.cells

    @property
    def num_vision(self) -> int:
        """Vision tokens of an image."""
        return self.side**2

    @property
    def num_segments(self) -> int:
        """Segments of an image."""
        return self.grid**2 // self.width

    @property
    def num_needed(self) -> int:
        """Vision tokens of a segment."""
        return self.width * self.cells**2

    @property
    def question_len(self) -> int:
        """Text tokens behind the image."""
        return QUESTION_WORDS + self.num_filler

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt, <bos> and image included."""
        return 1 + self.num_vision + self.question_len

    @property
    def vocab_size(self) -> int:
        """Token ids, rounded up to a multiple of 8."""
        return -(-(FIRST_REGION + 2 * self.grid) // 8) * 8


DESIGNS = {
    design.name: design
    for design in (
        Design("h", grid=16, patch=8, width=8),
        Design("q", grid=12, patch=4, width=6),
        Design("long", grid=16, patch=8, width=8, num_filler=12),
        Design("xl", grid=16, patch=4, width=8),
    )
}

SPLITS = {"train": slice(0, 1347), "validation": slice(1347, 1497), "test": slice(1497, 1797)}
"""Images of scikit-learn's digits per split, behind one fixed permutation."""
_SPLIT_SEED = 0
_NUM_VARIANTS = 40


def split_indices(split: str) -> Tensor:
    """Return which images of `load_digits` belong to a split [num_images] int64."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return order[SPLITS[split]]


@cache
def digit_bank(split: str) -> tuple[Tensor, Tensor]:
    """Return the digits of a split; those of "train" with affine variants.

    Returns:
        Pixels [num_images, 8, 8] float32 in [0, 1] and labels [num_images] int64.
    """
    digits = load_digits()
    chosen = split_indices(split)
    pixels = torch.tensor(digits.images, dtype=torch.float32)[chosen] / 16
    labels = torch.tensor(digits.target)[chosen]
    if split == "train":
        generator = torch.Generator().manual_seed(_SPLIT_SEED + 1)
        variants = [affine_variant(pixels, generator) for _ in range(_NUM_VARIANTS)]
        pixels, labels = torch.cat([pixels, *variants]), labels.repeat(1 + _NUM_VARIANTS)
    return pixels, labels


def affine_variant(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift every image a little [num_images, 8, 8]."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return (2 * torch.rand(len(pixels), *shape, generator=generator) - 1) * limit

    angle, scale, shear, shift = (
        uniform(0.22),
        1 + uniform(0.13, 2),
        uniform(0.15),
        uniform(0.17, 2),
    )
    matrix = torch.empty(len(pixels), 2, 3)
    matrix[:, 0, 0] = angle.cos() * scale[:, 0]
    matrix[:, 0, 1] = shear - angle.sin()
    matrix[:, 1, 0] = angle.sin()
    matrix[:, 1, 1] = angle.cos() * scale[:, 1]
    matrix[:, :, 2] = shift
    grid = F.affine_grid(matrix, [len(pixels), 1, *pixels.shape[1:]], align_corners=False)
    return F.grid_sample(pixels[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)


def draw_mosaics(
    design: Design, split: str, count: int, generator: torch.Generator, *, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draw mosaics, digits with replacement.

    Returns:
        Normalized pixels [count, 1, 8 * grid, 8 * grid] float32 and labels [count, grid, grid].
    """
    pixels, labels = digit_bank(split)
    grid = design.grid
    chosen = torch.randint(len(pixels), (count, grid, grid), generator=generator)
    digits = pixels[chosen]
    if noise:
        digits = digits + noise * torch.randn(digits.shape, generator=generator)
    image = digits.transpose(2, 3).reshape(count, 1, grid * DIGIT_PIXELS, grid * DIGIT_PIXELS)
    return (image - PIXEL_MEAN) / PIXEL_STD, labels[chosen]


def question_ids(design: Design, segments: Tensor, generator: torch.Generator) -> Tensor:
    """Return the tokens of questions [*segments.shape, question_len] int64; fillers are drawn."""
    per_row = design.grid // design.width
    ids = torch.empty(*segments.shape, design.question_len, dtype=torch.int64)
    ids[..., 0] = ROW
    ids[..., 1] = FIRST_REGION + segments // per_row
    ids[..., 2] = FIRST_REGION + design.grid + segments % per_row * design.width
    fillers = torch.randint(NUM_FILLERS, ids[..., 3:-1].shape, generator=generator)
    ids[..., 3:-1] = FIRST_FILLER + fillers
    ids[..., -1] = COLON
    return ids


def question_in_words(design: Design, ids: Tensor) -> str:
    """Say what a question [question_len] asks for; rows and columns are counted from 1."""
    row, column = (ids[1:3] - FIRST_REGION).tolist()
    return f"row {row + 1}, from column {column - design.grid + 1}: which {design.width} digits?"


def answer_in_words(ids: Sequence[int]) -> str:
    """Write out the digits of an answer, a question mark for a word that is none."""
    digits = [token - FIRST_DIGIT for token in ids]
    return " ".join(str(digit) if 0 <= digit < NUM_DIGITS else "?" for digit in digits)


def answer_ids(design: Design, labels: Tensor, segments: Tensor) -> Tensor:
    """Return the answers [count, num_questions, width] int64 to segments [count, num_questions]."""
    runs = labels.reshape(len(labels), design.num_segments, design.width)
    return FIRST_DIGIT + runs.gather(1, segments[..., None].expand(-1, -1, design.width))


def vision_tokens(design: Design, segments: Tensor) -> Tensor:
    """Return the vision tokens of each segment [*segments.shape, num_needed] int64, ascending."""
    token = torch.arange(design.num_vision)
    row, column = token // design.side // design.cells, token % design.side // design.cells
    segment_of_token = (row * design.grid + column) // design.width
    by_segment = segment_of_token.argsort(stable=True).view(design.num_segments, -1)
    return by_segment[segments]


def prompt_ids(design: Design, questions: Tensor) -> Tensor:
    """Put <bos> and the image in front of questions [count, question_len]."""
    bos = torch.full((len(questions), 1), BOS)
    image = torch.full((len(questions), design.num_vision), IMAGE_ID)
    return torch.cat([bos, image, questions], 1)
