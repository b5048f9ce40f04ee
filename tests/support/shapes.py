"""Named attention shapes: each is there because one kind of mistake shows on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The sizes of one query, key and value, how they lie in memory, and the padding.

    layout: "contiguous" [B, H, N, D]; "transposed" [B, N, H, D] underneath; "sliced" out of larger
    buffers, so that no stride follows from a size.
    left_padding: number of padding keys in front, one per sequence; () = none.
    hole_every: every so many-th key is padding; 0 = none. Without any padding there is no key mask.
    """

    name: str
    batch_size: int = 2
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    qo_len: int = 9
    kv_len: int = 21
    head_dim: int = 16
    layout: str = "contiguous"
    left_padding: tuple[int, ...] = ()
    hole_every: int = 0

    def __str__(self) -> str:
        return self.name


SMALLEST = Shape("smallest", 1, 1, 1, 1, 1, 8)
ODD = Shape("odd", 3, 6, 2, 5, 13, 24)
GROUP_1 = Shape("group_1", num_qo_heads=3, num_kv_heads=3, qo_len=7, kv_len=17)
GROUP_4 = Shape("group_4", num_qo_heads=8, num_kv_heads=2, qo_len=65, kv_len=65, head_dim=64)
GROUP_7 = Shape("group_7", num_qo_heads=14, num_kv_heads=2, head_dim=80)
GROUP_8 = Shape("group_8", 1, 8, 1, 13, 129, 128)
WIDEST = Shape("head_dim_256", 1, 4, 2, 7, 66, 256)
UNEVEN_DIM = Shape("head_dim_120", head_dim=120)
TRANSPOSED = Shape("transposed", layout="transposed", head_dim=96)
SLICED = Shape("sliced", layout="sliced", left_padding=(0, 3))
LEFT_PADDED = Shape("left_padded", 3, qo_len=150, kv_len=150, left_padding=(0, 70, 149))
HOLES = Shape("holes", hole_every=3)
ALL_PADDED = Shape("all_padded", left_padding=(21, 2))
LONG = Shape("long", 1, 4, 2, 70, 1030, 64)
VERY_LONG = Shape("very_long", 1, 2, 1, 200, 9001, 8)
DECODE = Shape("decode", 2, 8, 2, 5, 1100, 128, left_padding=(0, 600))
BATCH_0 = Shape("batch_0", 0)
KV_LEN_0 = Shape("kv_len_0", qo_len=0, kv_len=0)
QO_LEN_0 = Shape("qo_len_0", qo_len=0)

REGULAR = (SMALLEST, ODD, GROUP_1, GROUP_4, GROUP_7, GROUP_8, WIDEST, UNEVEN_DIM, LONG, VERY_LONG)
LAYOUTS = (TRANSPOSED, SLICED)
PADDED = (LEFT_PADDED, ALL_PADDED, HOLES)
EMPTY = (BATCH_0, KV_LEN_0, QO_LEN_0)
ALL = (*REGULAR, *LAYOUTS, *PADDED, *EMPTY)


def make_tensor(
    batch_size: int,
    num_heads: int,
    length: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
) -> Tensor:
    """Return a random tensor [batch_size, num_heads, length, head_dim] of any dtype and layout."""
    if layout == "transposed":
        size = (batch_size, length, num_heads, head_dim)
    elif layout == "sliced":
        size = (batch_size, num_heads + 1, length + 3, head_dim + 8)
    else:
        size = (batch_size, num_heads, length, head_dim)
    if dtype.is_floating_point:
        whole = torch.randn(size).to(dtype)
    else:
        whole = torch.randint(0, 100, size).to(dtype)
    whole = whole.to(device)
    if layout == "transposed":
        return whole.transpose(1, 2)
    return whole[:, :num_heads, :length, :head_dim]


@dataclass
class AttentionInputs:
    """Query, key and value of one shape, and its key mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None


def make_attention(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> AttentionInputs:
    """Return random inputs of a shape."""

    def make(num_heads: int, length: int) -> Tensor:
        return make_tensor(
            shape.batch_size,
            num_heads,
            length,
            shape.head_dim,
            dtype=dtype,
            device=device,
            layout=shape.layout,
        )

    key_mask = None
    index = torch.arange(shape.kv_len, device=device).expand(shape.batch_size, -1)
    if shape.left_padding:
        key_mask = index >= torch.tensor(shape.left_padding, device=device)[:, None]
    if shape.hole_every:
        key_mask = index % shape.hole_every != shape.hole_every - 1
    return AttentionInputs(
        make(shape.num_qo_heads, shape.qo_len),
        make(shape.num_kv_heads, shape.kv_len),
        make(shape.num_kv_heads, shape.kv_len),
        key_mask,
    )


def without_groups(shape: Shape) -> Shape:
    """Return the shape with one query head per KV head."""
    return replace(shape, num_qo_heads=shape.num_kv_heads)


def make_rows(batch_size: int, num_rows: int, qo_len: int, device: str = "cpu") -> Tensor:
    """Return row indices [batch_size, num_rows] int32 in no order, with a duplicate and a -1."""
    rows = torch.randint(-1, qo_len, (batch_size, num_rows), dtype=torch.int32)
    for column, row in enumerate((qo_len - 1, -1, qo_len - 1)[:num_rows]):
        rows[:, column] = row
    return rows.to(device)


def make_lists(
    shape: tuple[int, ...],
    kv_len: int,
    lens: Iterable[int],
    *,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return random ascending lists of `shape` [..., k] and their lengths, which cycle over `lens`.

    A list is padded with -1 beyond its length; no length exceeds k or kv_len.
    """
    *outer, k = shape
    choices = [min(length, k, kv_len) for length in lens]
    kept_indices = torch.full((*outer, k), -1, dtype=torch.int32)
    kept_lens = torch.zeros(outer, dtype=torch.int32)
    flat_indices, flat_lens = kept_indices.view(math.prod(outer), k), kept_lens.view(-1)
    for place in range(flat_lens.numel()):
        length = choices[place % len(choices)]
        flat_indices[place, :length] = torch.randperm(kv_len)[:length].sort().values
        flat_lens[place] = length
    return kept_indices.to(device), kept_lens.to(device)
