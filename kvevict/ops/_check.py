"""Contract checks of the fake kernels, in the words and the order of ``csrc/binding/check.h``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Size = int | torch.SymInt
Truth = bool | torch.SymBool
Dim = Size | tuple[Size, Size] | None  # a size, one of two sizes, any
ANY: Dim = None
INDEX_END = 2**31
_LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


class Check:
    """Refuses with ``kvevict::<op>: <argument> must <expectation>, got <value>``."""

    def __init__(self, op: str) -> None:
        self.op = op

    def fail(self, argument: str, expectation: str, value: object) -> NoReturn:
        raise ValueError(self._words(argument, expectation, value))

    def require(self, holds: Truth, argument: str, expectation: str, value: object) -> None:
        """Fails unless it holds; if that is known only when a graph runs, the graph checks it."""
        check: Any = torch._check_value
        check(holds, lambda: self._words(argument, expectation, value))

    def _words(self, argument: str, expectation: str, value: object) -> str:
        return f"kvevict::{self.op}: {argument} must {expectation}, got {value}"

    def shape(self, tensor: Tensor, argument: str, *expected: Dim) -> None:
        sizes = tensor.shape
        words = ", ".join(_dim_name(dim) for dim in expected)
        comma = "," if len(expected) == 1 else ""
        expectation = f"have shape ({words}{comma})"
        if len(sizes) != len(expected):
            self.fail(argument, expectation, tuple(sizes))
        for size, dim in zip(sizes, expected, strict=True):
            if dim is not None:
                first, second = dim if isinstance(dim, tuple) else (dim, dim)
                fits = (size == first) | (size == second)
                self.require(fits, argument, expectation, tuple(sizes))

    def dtype(self, tensor: Tensor, argument: str, *allowed: torch.dtype) -> None:
        if tensor.dtype not in allowed:
            names = [_dtype_name(dtype) for dtype in allowed]
            self.fail(argument, f"be {_join(names)}", _dtype_name(tensor.dtype))

    def device(self, tensor: Tensor, argument: str, reference: Tensor, name: str) -> None:
        if tensor.device != reference.device:
            self.fail(argument, f"be on {reference.device} as {name} is", tensor.device)

    def contiguous_last_dim(self, tensor: Tensor, argument: str) -> None:
        stride = tensor.stride(-1)
        fits = (tensor.shape[-1] <= 1) | (stride == 1)
        self.require(fits, argument, "have a contiguous last dimension", f"stride {stride}")

    def at_least(self, value: Size, argument: str, minimum: int) -> None:
        self.require(value >= minimum, argument, f"be at least {minimum}", value)

    def in_range(self, value: Size, argument: str, low: int, high: int) -> None:
        self.require((value >= low) & (value < high), argument, f"be in [{low}, {high})", value)

    def one_of(self, value: int, argument: str, names: Sequence[str]) -> None:
        if not 0 <= value < len(names):
            words = [f"{i} ({name})" for i, name in enumerate(names)]
            self.fail(argument, f"be {_join(words)}", int(value))

    def finite(self, value: float, argument: str) -> None:
        if abs(value) > _LARGEST_FLOAT32:
            value = math.copysign(math.inf, value)
        if not math.isfinite(value):
            self.fail(argument, "be finite", value)

    def indexable(self, tensor: Tensor, argument: str, dim: int, size_name: str) -> None:
        size = tensor.shape[dim]
        self.require(size < INDEX_END, argument, f"have a {size_name} below {INDEX_END}", size)

    def not_negative(self, value: float, argument: str) -> None:
        self.finite(value, argument)
        if not value >= 0:
            self.fail(argument, "be at least 0", f"{value:g}")

    def companion(
        self,
        tensor: Tensor,
        argument: str,
        dtype: torch.dtype,
        shape: Sequence[Dim],
        reference: Tensor,
        name: str,
    ) -> None:
        """Checks a small tensor that stands beside the op's first one."""
        self.device(tensor, argument, reference, name)
        self.dtype(tensor, argument, dtype)
        self.shape(tensor, argument, *shape)

    def scorable(self, tensor: Tensor, argument: str) -> None:
        """Checks a tensor [batch_size, num_heads, len, head_dim] whose rows are scored."""
        self.dtype(tensor, argument, torch.float32, torch.float16, torch.bfloat16)
        self.shape(tensor, argument, ANY, ANY, ANY, ANY)
        self.contiguous_last_dim(tensor, argument)
        head_dim = tensor.shape[3]
        fits = (head_dim >= 8) & (head_dim <= 256) & (head_dim % 8 == 0)
        self.require(fits, argument, "have a head_dim that is a multiple of 8 up to 256", head_dim)

    def movable(self, tensor: Tensor, argument: str) -> None:
        if tensor.element_size() not in (1, 2, 4, 8):
            self.fail(argument, "have elements of 1, 2, 4 or 8 bytes", _dtype_name(tensor.dtype))
        self.contiguous_last_dim(tensor, argument)


def check_attention(
    check: Check,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    sm_scale: float | None,
    causal: bool,
) -> None:
    check.scorable(query, "query")
    batch_size, num_qo_heads, qo_len, head_dim = query.shape
    check.companion(key, "key", query.dtype, (batch_size, ANY, ANY, head_dim), query, "query")
    check.contiguous_last_dim(key, "key")
    num_kv_heads, kv_len = key.shape[1:3]
    check.at_least(num_kv_heads, "key's num_kv_heads", 1)
    fits = (num_qo_heads >= 1) & (num_qo_heads % num_kv_heads == 0)
    check.require(fits, "query", f"have a multiple of key's {num_kv_heads} heads", num_qo_heads)
    if causal:
        words = f"have at most kv_len = {kv_len} rows when causal"
        check.require(qo_len <= kv_len, "query", words, qo_len)
    if key_mask is not None:
        check.companion(key_mask, "key_mask", torch.bool, (batch_size, kv_len), query, "query")
    if sm_scale is not None:
        check.finite(sm_scale, "sm_scale")


def check_voting_rows(
    check: Check,
    query: Tensor,
    row_index: Tensor | None,
    row_weight: Tensor | None,
    softmax_lse: Tensor | None,
) -> None:
    batch_size, num_qo_heads, qo_len = query.shape[:3]
    num_rows: Size = qo_len
    if row_index is not None:
        check.companion(row_index, "row_index", torch.int32, (batch_size, ANY), query, "query")
        check.indexable(query, "query", 2, "qo_len")
        num_rows = row_index.shape[1]
    if row_weight is not None:
        per_head: tuple[Dim, ...] = (batch_size, num_qo_heads, num_rows)
        shape = per_head if row_weight.dim() == 3 else (batch_size, num_rows)
        check.companion(row_weight, "row_weight", torch.float32, shape, query, "query")
    if softmax_lse is not None:
        shape = (batch_size, num_qo_heads, qo_len)
        check.companion(softmax_lse, "softmax_lse", torch.float32, shape, query, "query")


def check_head_reduction(check: Check, head_reduction: int) -> None:
    check.one_of(head_reduction, "head_reduction", ("NONE", "GROUP_MEAN", "GROUP_MAX", "ALL_MEAN"))


def check_priority(
    check: Check, priority: Tensor, shape: tuple[Size, Size, Size], reference: Tensor, name: str
) -> None:
    """Checks a priority per key, or per head and key, of scores of a shape."""
    expected = shape if priority.dim() == 3 else (shape[0], shape[2])
    check.companion(priority, "priority", torch.uint8, expected, reference, name)


def num_score_heads(query: Tensor, key: Tensor, head_reduction: int) -> Any:
    """The number of heads of the scores."""
    return (query.shape[1], key.shape[1], key.shape[1], 1)[head_reduction]


def check_kv_layers(check: Check, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    check.at_least(len(keys), "len(keys)", 1)
    if len(values) != len(keys):
        check.fail("values", f"have as many layers as keys, {len(keys)}", len(values))
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        check.device(key, f"keys[{layer}]", keys[0], "keys[0]")
        if layer == 0:
            check.shape(key, "keys[0]", ANY, ANY, ANY, ANY)
        else:
            check.shape(key, f"keys[{layer}]", *keys[0].shape[:2], ANY, ANY)
        check.indexable(key, f"keys[{layer}]", 2, "kv_len")
        check.movable(key, f"keys[{layer}]")
        check.device(value, f"values[{layer}]", keys[0], "keys[0]")
        check.shape(value, f"values[{layer}]", *key.shape[:3], ANY)
        check.movable(value, f"values[{layer}]")


def check_index_lists(
    check: Check,
    lists: Tensor,
    argument: str,
    shape: tuple[Size, Size, Size],
    reference: Tensor,
    name: str,
) -> None:
    """Checks index lists for ``(num_layers, batch_size, num_kv_heads)``."""
    expected = (*_list_dims(shape, all_layers=lists.dim() == 3), ANY)
    check.companion(lists, argument, torch.int32, expected, reference, name)
    check.indexable(lists, argument, -1, "k")


def check_list_lens(
    check: Check,
    lens: Tensor,
    argument: str,
    shape: tuple[Size, Size, Size],
    reference: Tensor,
    name: str,
) -> None:
    """Checks numbers in the arrangement of index lists."""
    expected = _list_dims(shape, all_layers=lens.dim() == 2)
    check.companion(lens, argument, torch.int32, expected, reference, name)


def check_kept_indices(
    check: Check,
    kept_indices: Tensor,
    kept_lens: Tensor | None,
    shape: tuple[Size, Size, Size],
    reference: Tensor,
    name: str = "keys[0]",
) -> None:
    """Checks index lists for ``(num_layers, batch_size, num_kv_heads)`` and their lengths."""
    check_index_lists(check, kept_indices, "kept_indices", shape, reference, name)
    if kept_lens is not None:
        lens_shape = kept_indices.shape[:-1]
        check.companion(kept_lens, "kept_lens", torch.int32, lens_shape, reference, name)


def check_token_lists(
    check: Check, lists: Tensor, argument: str, tokens: Tensor, name: str, length: Dim = ANY
) -> None:
    """Checks positions [batch_size, num_heads | 1, length] of tokens."""
    batch_size, num_heads = tokens.shape[:2]
    shape = (batch_size, (num_heads, 1), length)
    check.companion(lists, argument, torch.int32, shape, tokens, name)


def _list_dims(shape: tuple[Size, Size, Size], *, all_layers: bool) -> tuple[Dim, ...]:
    num_layers, batch_size, num_kv_heads = shape
    one_for_all: tuple[Dim, ...] = (batch_size, (num_kv_heads, 1))
    return one_for_all if all_layers else ((num_layers, 1), *one_for_all)


def _dim_name(dim: Dim) -> str:
    if dim is None:
        return "*"
    if isinstance(dim, tuple):
        return " or ".join(dict.fromkeys(map(str, dim)))
    return str(dim)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
