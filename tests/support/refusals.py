"""Every bad call that an op must refuse, in one table.

A row changes one argument of a good call. The op must raise a ValueError that reads
`kvevict::<op>: <argument> must <expectation>, got <value>`, and write nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.support.checks import spread
from tests.support.samples import SAMPLES, Arguments, Sizes, make_sample

Change = Callable[[Any], Any]

SIZES = Sizes()


@dataclass(frozen=True)
class Refusal:
    """One bad call: a good one of `op` with `argument` replaced by `change` of itself.

    blamed: the argument that the message names. reads_data: only the CPU must notice, or CUDA with
    KVEVICT_DEBUG=1.
    """

    op: str
    case: str
    argument: str
    change: Change
    blamed: str
    reads_data: bool = False
    also: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.case}"

    def make_arguments(self, device: str) -> Arguments:
        """Return the bad arguments."""
        arguments = make_good(self.op, device)
        arguments[self.argument] = self.change(arguments[self.argument])
        arguments.update(self.also)
        return arguments


def make_good(op: str, device: str) -> Arguments:
    """Return the good call that the rows of an op start from; it gives every optional argument."""
    arguments = make_sample(op, next(iter(SAMPLES[op])), replace(SIZES, device=device))
    if "kept_lens" in arguments:
        # All lists alike, so that any one of them can be spoiled in any of its entries.
        arguments["kept_indices"][:] = torch.tensor([0, 4, 5])
        arguments["kept_lens"][:] = 2
    if "slots" in arguments:
        arguments["slots"][:] = torch.tensor([1, 3, -1])
        arguments["kv_lens"][:] = 5
    return arguments


# --- Changes ------------------------------------------------------------------------------------


def to(value: Any) -> Change:
    """Return a change that replaces the argument."""
    return lambda _: value


def cast(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def drop(dim: int) -> Change:
    return lambda tensor: tensor.select(dim, 0)


def shorten(dim: int) -> Change:
    """Return a change that leaves out the last element of a dimension."""
    return lambda tensor: tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def lengthen(dim: int, extra: int = 1) -> Change:
    """Return a change that repeats the first elements of a dimension at its end."""
    return lambda tensor: torch.cat([tensor, tensor.narrow(dim, 0, extra)], dim)


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def put(value: float, *place: int) -> Change:
    """Return a change of one element."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def of_last(change: Change) -> Change:
    """Return a change of the last tensor of a list."""
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


# --- The table ----------------------------------------------------------------------------------


def _rows(
    op: str,
    argument: str,
    cases: dict[str, Change],
    *,
    blamed: str | None = None,
    reads_data: bool = False,
    also: tuple[tuple[str, Any], ...] = (),
) -> Iterator[Refusal]:
    for case, change in cases.items():
        yield Refusal(op, case, argument, change, blamed or argument, reads_data, also)


def _tensor(op: str, argument: str, wrong_dtype: torch.dtype, **cases: Change) -> Iterator[Refusal]:
    """Yield what every tensor refuses, and more cases by name."""
    name = str(wrong_dtype).removeprefix("torch.")
    common = {"rank": drop(0), name: cast(wrong_dtype), "device": elsewhere}
    yield from _rows(op, argument, common | cases)


# What a query or key refuses that comes first.
SCORABLE: dict[str, Change] = {
    "rank": drop(0),
    "float64": cast(torch.float64),
    "int32": cast(torch.int32),
    "strided": spread,
    "head_dim_12": lambda rows: rows[..., :12],
    "head_dim_264": lambda rows: rows.new_zeros(*rows.shape[:3], 264),
}


SCORES: dict[str, Change] = {
    "rank": drop(0),
    "float16": cast(torch.float16),
    "float64": cast(torch.float64),
}


def _key_mask(op: str) -> Iterator[Refusal]:
    yield from _tensor(op, "key_mask", torch.uint8, batch_size=shorten(0), kv_len=shorten(1))


def _query_and_key(op: str) -> Iterator[Refusal]:
    yield from _rows(
        op,
        "query",
        {
            **SCORABLE,
            "heads": shorten(1),
            "longer_than_key": lengthen(2, 3),
        },
    )
    yield from _rows(
        op,
        "key",
        {
            "rank": drop(0),
            "dtype": cast(torch.float16),
            "device": elsewhere,
            "strided": spread,
            "batch_size": shorten(0),
            "head_dim": shorten(3),
        },
    )
    yield from _key_mask(op)
    yield from _rows(op, "sm_scale", {"nan": to(float("nan")), "inf": to(float("inf"))})


def _rows_that_vote(op: str) -> Iterator[Refusal]:
    yield from _tensor(op, "row_index", torch.int64, batch_size=shorten(0))
    yield from _rows(
        op,
        "row_index",
        {"above": put(SIZES.qo_len, 1, 2), "below": put(-2, 0, 0)},
        reads_data=True,
    )
    yield from _tensor(
        op,
        "softmax_lse",
        torch.float64,
        batch_size=shorten(0),
        heads=shorten(1),
        qo_len=shorten(2),
    )


def _weights(op: str) -> Iterator[Refusal]:
    yield from _tensor(
        op,
        "row_weight",
        torch.float64,
        batch_size=shorten(0),
        num_rows=shorten(1),
        heads=lambda weight: weight[:, None].repeat(1, SIZES.num_kv_heads, 1),
    )
    yield from _rows(
        op,
        "row_weight",
        {
            "negative": put(-0.5, 0, 1),
            "nan": put(float("nan"), 1, 0),
            "inf": put(float("inf"), 0, 0),
        },
        reads_data=True,
    )


def _priorities(op: str) -> Iterator[Refusal]:
    yield from _tensor(
        op,
        "priority",
        torch.int8,
        bool=cast(torch.bool),
        batch_size=shorten(0),
        kv_len=shorten(1),
        heads=lambda priority: priority[:, None].repeat(1, SIZES.num_kv_heads + 1, 1),
    )


def _list_tensor(op: str, argument: str) -> Iterator[Refusal]:
    yield from _rows(
        op,
        argument,
        {
            "rank_2": lambda indices: indices[0, 0],
            "rank_5": lambda indices: indices[None],
            "int64": cast(torch.int64),
            "layers": lengthen(0),
            "heads": lengthen(2),
        },
    )


def _index_lists(op: str) -> Iterator[Refusal]:
    yield from _list_tensor(op, "kept_indices")
    yield from _tensor(
        op,
        "kept_lens",
        torch.int64,
        layers=lengthen(0),
        batch_size=shorten(1),
        heads=lengthen(2),
    )
    yield from _rows(
        op,
        "kept_indices",
        {
            "not_ascending": put(5, 1, 1, 1, 0),
            "repeated": put(0, 0, 1, 0, 1),
            "negative": put(-1, 0, 0, 1, 0),
            "above": put(SIZES.kv_len, 1, 0, 1, 1),
        },
        reads_data=True,
    )
    yield from _rows(
        op,
        "kept_lens",
        {"above_k": put(SIZES.k + 1, 1, 1, 1), "negative": put(-1, 0, 0, 0)},
        reads_data=True,
    )


def _caches(op: str) -> Iterator[Refusal]:
    both = {
        "rank": drop(0),
        "complex128": cast(torch.complex128),
        "strided": spread,
        "batch_size": shorten(0),
        "heads": shorten(1),
    }
    yield from _rows(op, "keys", {case: of_last(change) for case, change in both.items()})
    with_kv_len = {**both, "kv_len": shorten(2), "device": elsewhere}
    yield from _rows(op, "values", {case: of_last(change) for case, change in with_kv_len.items()})
    yield from _rows(op, "values", {"shorter_list": lambda values: values[:1]})


def _moved(op: str) -> Iterator[Refusal]:
    yield from _caches(op)
    yield from _index_lists(op)
    yield from _rows(op, "kept_indices", {"device": elsewhere, "batch_size": shorten(1)})
    yield from _rows(
        op,
        "kept_indices",
        {"padded_without_lens": put(-1, 1, 1, 0, 2)},
        reads_data=True,
        also=(("kept_lens", None),),
    )


def _null() -> Iterator[Refusal]:
    yield from _rows("null", "input", {"float64": cast(torch.float64), "int32": cast(torch.int32)})


def _accumulate_scores() -> Iterator[Refusal]:
    op = "accumulate_scores_"
    yield from _query_and_key(op)
    yield from _weights(op)
    yield from _tensor(
        op,
        "scores",
        torch.float64,
        strided=spread,
        batch_size=shorten(0),
        heads=shorten(1),
        too_short=lambda scores: scores[..., : SIZES.kv_len - 1],
    )
    yield from _rows(op, "decay", {"nan": to(float("nan")), "inf": to(float("inf"))})
    yield from _rows(op, "head_reduction", {"below": to(-1), "above": to(4)})


def _attention_lse() -> Iterator[Refusal]:
    yield from _query_and_key("attention_lse")


def _score_keys() -> Iterator[Refusal]:
    op = "score_keys"
    yield from _query_and_key(op)
    yield from _rows_that_vote(op)
    yield from _weights(op)
    yield from _rows(op, "statistic", {"below": to(-1), "above": to(3)})
    yield from _rows(op, "head_reduction", {"below": to(-1), "above": to(4)})


def _score_keys_by_text() -> Iterator[Refusal]:
    yield from _query_and_key("score_keys_by_text")
    yield from _rows_that_vote("score_keys_by_text")


def _key_diversity() -> Iterator[Refusal]:
    yield from _rows("key_diversity", "key", SCORABLE)
    yield from _key_mask("key_diversity")


def _mix_scores() -> Iterator[Refusal]:
    op = "mix_scores"
    yield from _rows(op, "scores", SCORES)
    for argument in ("similarity", "value_norm"):
        yield from _tensor(
            op,
            argument,
            torch.float64,
            batch_size=shorten(0),
            heads=lengthen(1),
            kv_len=shorten(2),
        )
    yield from _tensor(op, "redundancy", torch.float64, batch_size=shorten(0), heads=shorten(1))
    yield from _priorities(op)
    yield from _rows(op, "diversity_reference", {"below": to(-1), "above": to(2)})


def _select_topk() -> Iterator[Refusal]:
    op = "select_topk"
    yield from _rows(op, "scores", SCORES)
    yield from _rows(op, "k", {"negative": to(-1), "huge": to(2**31), "largest": to(2**63 - 1)})
    yield from _tensor(op, "row_k", torch.int64, batch_size=shorten(0), heads=shorten(1))
    yield from _rows(
        op, "row_k", {"negative": put(-1, 0, 1), "above_k": put(SIZES.k + 1, 1, 0)}, reads_data=True
    )
    yield from _priorities(op)


def _select_threshold() -> Iterator[Refusal]:
    op = "select_threshold"
    yield from _rows(
        op,
        "sums",
        {"rank": drop(0), "float16": cast(torch.float16), "float64": cast(torch.float64)},
    )
    sizes = {"batch_size": shorten(0), "kv_len": shorten(-1)}
    yield from _tensor(op, "maxima", torch.float64, heads=shorten(1), **sizes)
    yield from _tensor(op, "candidates", torch.uint8, **sizes)
    yield from _tensor(op, "key_mask", torch.uint8, **sizes)
    not_finite = {"nan": to(float("nan")), "inf": to(float("inf")), "huge": to(1e39)}
    too_small = {"negative": to(-0.5), "tiny": to(-1e-50)}
    yield from _rows(op, "ratio", {"missing": to(None), **not_finite, **too_small})
    yield from _rows(op, "kappa", {"with_ratio": to(0.86)})
    instead = (("ratio", None),)
    yield from _rows(op, "kappa", {**not_finite, **too_small}, also=instead)
    yield from _rows(op, "alpha", not_finite)
    yield from _rows(op, "max_evicted", {"negative": to(-1)})


def _broadcast_indices() -> Iterator[Refusal]:
    op = "broadcast_indices"
    yield from _index_lists(op)
    yield from _rows(op, "num_layers", {"negative": to(-1)})
    yield from _rows(op, "num_kv_heads", {"negative": to(-1)})
    yield from _tensor(
        op,
        "base_indices",
        torch.int64,
        layers=lambda base: base.repeat(SIZES.num_layers + 1, 1, 1, 1),
        batch_size=shorten(1),
        heads=lengthen(2),
    )
    yield from _rows(
        op,
        "base_indices",
        {
            "below": put(-2, 0, 1, 0, 5),
            "above": put(8, 0, 0, 1, 5),  # pages for 8 positions
            "not_ascending": put(1, 0, 1, 1, 2),
            "repeated": put(2, 0, 0, 0, 1),
            "none_in_the_middle": put(-1, 0, 1, 0, 3),
            "none_in_front": put(-1, 0, 0, 1, 0),
        },
        reads_data=True,
    )
    yield from _tensor(op, "block_tables", torch.int64, layers=lengthen(0), batch_size=shorten(1))
    yield from _rows(op, "page_size", {"zero": to(0), "negative": to(-1), "huge": to(2**31)})
    yield from _rows(
        op,
        "block_tables",
        {"below": put(-2, 0, 1, 0), "above": put(2**30, 1, 0, 1)},
        reads_data=True,
    )


def _gather_kv() -> Iterator[Refusal]:
    yield from _moved("gather_kv")


def _compact_kv() -> Iterator[Refusal]:
    yield from _moved("compact_kv_")


def _evict_slots() -> Iterator[Refusal]:
    op = "evict_slots_"
    yield from _caches(op)
    yield from _list_tensor(op, "slots")
    yield from _rows(op, "slots", {"device": elsewhere, "batch_size": shorten(1)})
    yield from _rows(
        op,
        "kv_lens",
        {
            "rank_1": lambda lens: lens[0, 0],
            "rank_4": lambda lens: lens[None],
            "int64": cast(torch.int64),
            "layers": lengthen(0),
            "batch_size": shorten(1),
            "heads": lengthen(2),
            "device": elsewhere,
        },
    )
    yield from _rows(
        op,
        "slots",
        {
            "not_ascending": put(4, 1, 1, 1, 0),
            "repeated": put(1, 0, 1, 0, 1),
            "negative": put(-2, 0, 0, 1, 0),
            "not_live": put(5, 1, 0, 1, 1),
            "padded_in_front": put(-1, 1, 1, 0, 0),
        },
        reads_data=True,
    )
    yield from _rows(
        op,
        "kv_lens",
        {"above_capacity": put(SIZES.kv_len + 1, 1, 1, 1), "negative": put(-1, 0, 0, 0)},
        reads_data=True,
    )
    yield from _rows(op, "kv_lens", {"too_few": put(3, 0, 1, 1)}, blamed="slots", reads_data=True)


def _rerotate_keys() -> Iterator[Refusal]:
    op = "rerotate_keys_"
    of_the_last = {
        "rank": drop(0),
        "float16": cast(torch.float16),
        "strided": spread,
        "batch_size": shorten(0),
        "heads": shorten(1),
        "device": elsewhere,
    }
    yield from _rows(op, "keys", {case: of_last(change) for case, change in of_the_last.items()})
    yield from _rows(
        op,
        "keys",
        {
            "none": lambda keys: keys[:0],
            "float64": lambda keys: [key.double() for key in keys],
        },
        blamed=r"(len\()?keys\)?",
    )
    narrow = of_last(lambda key: key[..., :13])
    yield from _rows(op, "keys", {"head_dim": narrow}, blamed="inv_freq")
    yield from _rows(op, "keys", {"kv_len": of_last(lengthen(2))}, blamed="old_positions")
    for argument, dim in (("old_positions", 1), ("new_positions", 2)):
        yield from _tensor(
            op,
            argument,
            torch.int64,
            batch_size=shorten(dim),
            heads=lambda positions: positions.repeat_interleave(3, -2),
            kv_len=shorten(dim + 2),
            longer=lengthen(dim + 2),
            rank_6=lambda positions: positions[None, None],
        )
        yield from _rows(op, argument, {"below": put(-2, 2, 0)}, reads_data=True)
    yield from _rows(op, "old_positions", {"no_axis": lambda positions: positions[:0]})
    yield from _rows(op, "new_positions", {"layers": lengthen(1), "axes": shorten(0)})
    yield from _rows(op, "axis_of_freq", {"none": to(None)}, blamed="old_positions")
    yield from _tensor(op, "inv_freq", torch.float64, too_many=lambda freq: freq.repeat(2))
    not_finite = {"nan": put(float("nan"), 3), "inf": put(-float("inf"), 0)}
    yield from _rows(op, "inv_freq", not_finite, reads_data=True)
    yield from _tensor(op, "axis_of_freq", torch.int64, num_freqs=shorten(0))
    yield from _rows(op, "axis_of_freq", {"above": put(3, 4), "below": put(-1, 0)}, reads_data=True)


def _token_lists(op: str, *arguments: str) -> Iterator[Refusal]:
    for argument in arguments:
        yield from _tensor(op, argument, torch.int64, batch_size=shorten(0), heads=lengthen(1))
        values = {"below": put(-2, 0, 0, 0), "above": put(SIZES.kv_len, 1, 1, 2)}
        yield from _rows(op, argument, values, reads_data=True)


def _match_tokens() -> Iterator[Refusal]:
    op = "match_tokens"
    yield from _rows(
        op,
        "tokens",
        {
            "rank": drop(0),
            "float64": cast(torch.float64),
            "int32": cast(torch.int32),
            "strided": spread,
            "dim_12": lambda tokens: tokens[..., :12],
            "dim_0": lambda tokens: tokens[..., :0],
        },
    )
    yield from _token_lists(op, "source_index", "target_index")
    for argument in ("source_group", "target_group"):
        sizes = {"batch_size": shorten(0), "heads": shorten(1), "length": shorten(2)}
        yield from _tensor(op, argument, torch.int64, **sizes)
        yield from _rows(op, argument, {"missing": to(None)})
        values = {"negative": put(-1, 0, 0, 0), "descending": put(5, 1, 1, 0)}
        yield from _rows(op, argument, values, reads_data=True)
    yield from _rows(op, "metric", {"below": to(-1), "above": to(2)})


def _merge_tokens() -> Iterator[Refusal]:
    op = "merge_tokens_"
    tokens = {
        "rank": drop(0),
        "float64": cast(torch.float64),
        "strided": spread,
        "batch_size": shorten(0),
        "heads": shorten(1),
        "num_tokens": shorten(2),
        "dim_12": lambda tensor: tensor[..., :12],
        "device": elsewhere,
    }
    yield from _rows(op, "tensors", {case: of_last(change) for case, change in tokens.items()})
    yield from _token_lists(op, "source_index", "match_index")
    yield from _rows(op, "match_index", {"length": shorten(2)})
    yield from _rows(op, "match_index", {"a_source": put(0, 1, 0, 0)}, reads_data=True)
    yield from _tensor(
        op,
        "weight",
        torch.float64,
        batch_size=shorten(0),
        heads=lengthen(1),
        num_tokens=shorten(2),
    )
    values = {"nan": put(float("nan"), 0, 1, 2), "inf": put(float("inf"), 1, 0, 0)}
    yield from _rows(op, "weight", values, reads_data=True)


def _score_and_compact() -> Iterator[Refusal]:
    op = "score_and_compact"
    yield from _query_and_key(op)
    yield from _rows_that_vote(op)
    yield from _weights(op)
    yield from _priorities(op)
    yield from _tensor(
        op,
        "value",
        torch.complex128,
        strided=spread,
        batch_size=shorten(0),
        heads=shorten(1),
        kv_len=shorten(2),
    )
    yield from _rows(op, "budget", {"negative": to(-1), "huge": to(2**31)})
    yield from _rows(op, "pool_kernel", {"even": to(2), "zero": to(0), "negative": to(-3)})
    yield from _rows(
        op,
        "head_reduction",
        {"below": to(-1), "above": to(4), "none_of_a_group": to(0)},
    )
    weighted = (("text_weighted", True), ("row_weight", None))
    yield from _rows(op, "row_index", {"missing": to(None)}, also=weighted)
    yield from _rows(op, "text_weighted", {"with_weights": to(True)}, blamed="row_weight")
    yield from _rows(op, "causal", {"text_not_causal": to(False)}, also=weighted)


REFUSALS: tuple[Refusal, ...] = tuple(
    row
    for rows in (
        _null,
        _accumulate_scores,
        _attention_lse,
        _score_keys,
        _score_keys_by_text,
        _key_diversity,
        _mix_scores,
        _select_topk,
        _select_threshold,
        _broadcast_indices,
        _gather_kv,
        _compact_kv,
        _evict_slots,
        _rerotate_keys,
        _match_tokens,
        _merge_tokens,
        _score_and_compact,
    )
    for row in rows()
)


def overlapping_arguments(op: str, device: str) -> Iterator[tuple[str, Arguments]]:
    """Yield bad calls of an op that writes key and value, or a list: they share memory."""
    ("keys", "values") if "keys" in make_good(op, device) else ("key", "value")

    def call(key: Tensor, value: Tensor) -> Arguments:
        arguments = make_good(op, device)
        if "tensors" in arguments:
            return {**arguments, "tensors": [key, value]}
        for names, tensor in ((("key", "keys"), key), (("value", "values"), value)):
            name = next(name for name in names if name in arguments)
            arguments[name] = [*arguments[name][:-1], tensor] if name.endswith("s") else tensor
        return arguments

    def make(length: int = SIZES.kv_len) -> Tensor:
        return torch.randn(
            SIZES.batch_size, SIZES.num_kv_heads, length, SIZES.head_dim, device=device
        )

    whole = make(SIZES.kv_len + 1)
    yield "same", call(whole[:, :, :-1], whole[:, :, :-1])
    yield "shifted", call(whole[:, :, :-1], whole[:, :, 1:])
    one_row = make(1).expand(-1, -1, SIZES.kv_len, -1)
    yield "expanded", call(make(), one_row)
