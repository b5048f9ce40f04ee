"""Rotary position embeddings of cached keys, moved to other positions in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvevict.ops._check import ANY, Check, Dim, Size
from kvevict.ops._fake import register_fake


def rerotate_keys_(
    keys: Sequence[Tensor],
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    *,
    axis_of_freq: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Turns rotated keys as if they had been rotated at other positions, all layers in place.

    Pair ``c`` of channels turns by ``(new - old) * inv_freq[c]``: what StreamingLLM does that
    assigns positions inside the cache (arXiv 2309.17453, section 3.2), and what a cache needs whose
    positions restart after merging (LightKV, arXiv 2605.00789). A slot whose old and new positions
    are equal keeps every byte, and so does an empty one: -1 in any of its positions. A refused call
    leaves every byte as it was.

    Args:
        keys: per layer [batch_size, num_kv_heads, kv_len, head_dim] float32, float16 or bfloat16,
            one dtype for all, any strides with a contiguous last dimension; no two tensors may
            share elements, nor any with another argument. kv_len and head_dim may differ from layer
            to layer.
        old_positions: int32, at least -1: [batch_size, kv_len] as transformers has position_ids, or
            by head or by layer as lists of :func:`compact_kv_`, [batch_size, num_kv_heads | 1,
            kv_len] or [num_layers | 1, batch_size, num_kv_heads | 1, kv_len]. kv_len is that of the
            longest layer; the others ignore the rest. With axis_of_freq one of these for every
            axis, stacked in front: [num_axes, batch_size, kv_len] and so on.
        new_positions: the same, in the same or another of these forms, for the same axes.
        inv_freq: [rotary_dim / 2] float32, finite, in radians per position: the first rotary_dim <=
            head_dim channels turn, the others are not touched. A factor of cos and sin (YaRN's
            attention scaling) stays in the keys; frequencies that depend on the length of the
            prompt (dynamic NTK) must be those that rotated them.
        axis_of_freq: [rotary_dim / 2] int32, the axis of positions that turns each pair, as in
            M-RoPE: [0] * 16 + [1] * 24 + [2] * 24 for the sections of Qwen2.5-VL; Qwen3-VL
            interleaves the axes. None without axes.
        interleaved: pairs of channels (2c, 2c + 1), as in GPT-J; else (c, c + rotary_dim / 2), as
            transformers' Llama and Qwen have them.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of the positions,
            inv_freq and axis_of_freq are checked on the CPU only.

    The angle is exact to 2^-32 turns for distances up to 2^20 positions, by arithmetic modulo one
    turn in 64-bit fixed point; cos, sin and the products are float32, and results are rounded once.
    Reads and writes the rows that turn, once. Angles are computed once for all layers and heads
    that share positions. Extra memory: 16 kB per thread for 64 frequencies.
    """
    torch.ops.kvevict.rerotate_keys_(
        keys,
        old_positions,
        new_positions,
        inv_freq,
        axis_of_freq=axis_of_freq,
        interleaved=interleaved,
    )


@register_fake("rerotate_keys_")
def _(
    keys: Sequence[Tensor],
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    *,
    axis_of_freq: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    check = Check("rerotate_keys_")
    _check_keys(check, keys)
    head_dim = min(key.shape[3] for key in keys)
    check.companion(inv_freq, "inv_freq", torch.float32, (ANY,), keys[0], "keys[0]")
    num_freqs = inv_freq.shape[0]
    if 2 * num_freqs > head_dim:
        check.fail("inv_freq", f"have at most head_dim / 2 = {head_dim // 2} elements", num_freqs)
    if axis_of_freq is None:
        _check_positions(check, old_positions, "old_positions", keys, ())
        _check_positions(check, new_positions, "new_positions", keys, ())
        return
    axes_of = (axis_of_freq, "axis_of_freq", torch.int32, (num_freqs,))
    check.companion(*axes_of, keys[0], "keys[0]")
    _check_positions(check, old_positions, "old_positions", keys, (ANY,))
    _check_positions(check, new_positions, "new_positions", keys, (old_positions.shape[0],))


def _check_keys(check: Check, keys: Sequence[Tensor]) -> None:
    check.at_least(len(keys), "len(keys)", 1)
    for layer, key in enumerate(keys):
        name = f"keys[{layer}]"
        check.device(key, name, keys[0], "keys[0]")
        if layer == 0:
            check.shape(key, name, ANY, ANY, ANY, ANY)
            check.dtype(key, name, torch.float32, torch.float16, torch.bfloat16)
        else:
            check.shape(key, name, *keys[0].shape[:2], ANY, ANY)
            check.dtype(key, name, keys[0].dtype)
        check.contiguous_last_dim(key, name)


def _check_positions(
    check: Check, positions: Tensor, name: str, keys: Sequence[Tensor], axes: tuple[Dim, ...]
) -> None:
    """Checks the form of positions; axes is () without axes, else the expected number of them."""
    batch_size, num_kv_heads = keys[0].shape[:2]
    kv_len: Size = max(key.shape[2] for key in keys)
    rank = positions.dim() - len(axes)
    layers: tuple[Dim, ...] = () if rank in (2, 3) else ((len(keys), 1),)
    heads: tuple[Dim, ...] = () if rank == 2 else ((num_kv_heads, 1),)
    expected = (*axes, *layers, batch_size, *heads, kv_len)
    check.companion(positions, name, torch.int32, expected, keys[0], "keys[0]")
    if axes and positions.shape[0] == 0:
        check.fail(name, "have an axis at least", 0)
