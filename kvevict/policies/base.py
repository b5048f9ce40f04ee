"""What every eviction policy shares: score -> budget -> select -> compact.

A policy never sees a framework. An engine (the transformers integration is one, `evict_prompt` of
`kvevict.policies.engine` is the smallest) hands it the tensors of one layer at a time and gets back
which keys stay:

1. `row_index(prompt)`: which query rows the policy wants to look at;
2. `observe(query, key, value, prompt, row_index)`: the scores of one layer, O(kv_len) of state;
3. `revise(layers)`: the same scores unless a layer's depend on another layer;
4. `budgets(layers)`: how many keys each layer, sequence and list may keep;
5. `select(layer, budget, k)`: the kept keys of one layer.

These five are `PrefillPolicy`, the protocol of methods that decide after the prompt. Methods that
merge, act between layers or while decoding get protocols of their own beside it.

Budgets count every kept key: sinks, recent window, text and vision alike are inside `keep`, and
where a method leaves whole layers alone, the others pay for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral, Real
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.priority import FORCED, build_priority

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
"""Codes of `Prompt.modality`, as transformers' `mm_token_type_ids` has them."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is known about the stored keys, for all heads of a layer.

    Attributes:
        modality: [batch_size, kv_len] int8, one of `TEXT`, `IMAGE`, `VIDEO`, `AUDIO`.
        key_mask: [batch_size, kv_len] bool, False = padding or an empty slot; None = all real.
        qo_len: the number of query rows; row i stands at key `kv_len - qo_len + i`. None = kv_len.
        total_lens: [batch_size] int64, the real tokens of the conversation so far. It exceeds the
            real keys where an earlier turn was evicted; a ratio `keep` refers to it. None = the
            number of real keys.
        key_weight: [batch_size, 1 | num_kv_heads, kv_len] float32, how many tokens each key counts
            for in attention, where an earlier turn merged some; None = one each. Methods that
            give such weights score with them.
    """

    modality: Tensor
    key_mask: Tensor | None = None
    qo_len: int | None = None
    total_lens: Tensor | None = None
    key_weight: Tensor | None = None

    @property
    def kv_len(self) -> int:
        """Number of key slots, padding included."""
        return self.modality.shape[1]

    @property
    def num_queries(self) -> int:
        """Number of query rows."""
        return self.kv_len if self.qo_len is None else self.qo_len

    @cached_property
    def valid(self) -> Tensor:
        """[batch_size, kv_len] bool: real keys."""
        if self.key_mask is None:
            return torch.ones_like(self.modality, dtype=torch.bool)
        return self.key_mask

    @cached_property
    def lens(self) -> Tensor:
        """[batch_size] int64: number of real keys."""
        return self.valid.sum(1)

    @cached_property
    def totals(self) -> Tensor:
        """[batch_size] int64: real tokens of the conversation, evicted ones included."""
        return self.lens if self.total_lens is None else self.total_lens

    @cached_property
    def is_vision(self) -> Tensor:
        """[batch_size, kv_len] bool: real image and video keys."""
        return ((self.modality == IMAGE) | (self.modality == VIDEO)) & self.valid

    @cached_property
    def rank_from_start(self) -> Tensor:
        """[batch_size, kv_len] int64: how many real keys come before this one."""
        return self.valid.cumsum(1) - self.valid.long()

    @cached_property
    def rank_from_end(self) -> Tensor:
        """[batch_size, kv_len] int64: how many real keys come after this one."""
        return self.lens[:, None] - self.rank_from_start - self.valid.long()

    @cached_property
    def trailing_text(self) -> Tensor:
        """[batch_size, kv_len] bool: text keys after the last vision key that have a query row.

        Nothing where there is no vision.
        """
        vision_from_here = self.is_vision.flip(1).cumsum(1).flip(1)
        position = torch.arange(self.kv_len, device=self.modality.device)
        is_query = position >= self.kv_len - self.num_queries
        text = self.valid & (self.modality == TEXT) & is_query
        return text & (vision_from_here == 0) & self.is_vision.any(1, keepdim=True)

    @cached_property
    def lacks_trailing_text(self) -> Tensor:
        """[batch_size] bool: vision, but no text row after it."""
        return self.is_vision.any(1) & ~self.trailing_text.any(1)

    @cached_property
    def some_lack_trailing_text(self) -> bool:
        """Whether there is such a sequence (reading it synchronizes with the device, once)."""
        return bool(self.lacks_trailing_text.any())

    def trailing_rows(self) -> Tensor:
        """Return the rows of `trailing_text`, all real ones of a sequence that has none."""
        has_text = self.trailing_text.any(1, keepdim=True)
        return self.rows_of(self.trailing_text.where(has_text, self.valid))

    def last_rows(self, count: int) -> Tensor:
        """Return the rows of the last `count` real keys, as `rows_of` does."""
        return self.rows_of(self.valid & (self.rank_from_end < count))

    def rows_of(self, keys: Tensor) -> Tensor:
        """Turn a mask over keys [batch_size, kv_len] into a list of the query rows it marks.

        Returns:
            [batch_size, num_rows] int32, ascending, -1 beyond a sequence's own rows; num_rows is
            the largest count of the batch (reading it synchronizes with the device).
        """
        rows = keys[:, self.kv_len - self.num_queries :]
        num_rows = int(rows.sum(1).max()) if rows.numel() else 0
        index = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        ascending = index.where(rows, rows.shape[1]).sort(1).values[:, :num_rows]
        return ascending.where(ascending < rows.shape[1], -1).int()


@dataclass(frozen=True, eq=False)
class LayerScores:
    """What a policy remembers of one layer until all layers have run.

    Attributes:
        scores: [batch_size, 1 | num_kv_heads, kv_len] float32, higher is kept first.
        prompt: the keys the scores belong to.
        mass: [batch_size] float32, what the layer's share of the total budget is taken from.
    """

    scores: Tensor
    prompt: Prompt
    mass: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """The keys that stay in one layer.

    Attributes:
        kept_indices: [batch_size, 1 | num_kv_heads, k] int32, ascending, -1 beyond kept_lens.
        kept_lens: [batch_size, 1 | num_kv_heads] int32.
        keeps_all: every key slot stays, there is nothing to move.
        ragged: some list is shorter than k, so the compacted cache has empty slots at its end.
        key_weight: [batch_size, 1 | num_kv_heads, k] float32, how many tokens each kept key counts
            for in attention, which adds log(weight) to its logits; None = as many as before.
    """

    kept_indices: Tensor
    kept_lens: Tensor
    keeps_all: bool = False
    ragged: bool = False
    key_weight: Tensor | None = None


@runtime_checkable
class PrefillPolicy(Protocol):
    """Decides once, after the prompt went through all layers."""

    def row_index(self, prompt: Prompt) -> Tensor | None:
        """Return the query rows to observe [batch_size, num_rows] int32, -1 = none; None = all."""
        ...

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        *,
        sm_scale: float | None = None,
        softmax_lse: Tensor | None = None,
    ) -> LayerScores:
        """Score the keys of one layer.

        Args:
            query: [batch_size, num_qo_heads, qo_len, head_dim], as attention uses it (rotated).
            key: [batch_size, num_kv_heads, kv_len, head_dim], as cached.
            value: like key.
            prompt: what the keys are.
            row_index: the result of `self.row_index(prompt)`.
            sm_scale: the scale of the logits; None = 1 / sqrt(head_dim).
            softmax_lse: [batch_size, num_qo_heads, qo_len] float32, if the engine has it.
        """
        ...

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Return the scores to decide by, now that those of all layers are known."""
        ...

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return how many keys stay, per layer and sequence or per list.

        Returns:
            [num_layers, batch_size] or [num_layers, batch_size, num_lists] int64, num_lists being
            that of the scores.
        """
        ...

    def select(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Choose the keys of one layer.

        Args:
            layer: its scores.
            budget: [batch_size] or [batch_size, num_lists] int64, this layer's row of `budgets`,
                at most the real keys.
            k: the largest of them.

        Returns:
            kept_indices [batch_size, 1 | num_kv_heads, k] int32 and kept_lens, its shape without k.
        """
        ...


@runtime_checkable
class SharingPolicy(Protocol):
    """A `PrefillPolicy` whose first layer decides for later ones."""

    def observe_later(
        self,
        first: LayerScores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        *,
        sm_scale: float | None = None,
        softmax_lse: Tensor | None = None,
    ) -> LayerScores:
        """Score a layer behind the first; called in place of `observe`.

        Args:
            first: what `observe` returned for the first layer.
            query: see `PrefillPolicy.observe`, here and below.
            key: of this layer.
            value: of this layer.
            prompt: what its keys are; not `first.prompt` if rows were removed in between.
            row_index: the result of `self.row_index(prompt)`.
            sm_scale: the scale of the logits.
            softmax_lse: if the engine has it.
        """
        ...


@dataclass(frozen=True)
class Policy:
    """Fields and defaults that policies share; subclasses are frozen dataclasses.

    As it stands, every row votes for every key, each KV head keeps a list of its own, and all have
    the same length. A method overrides what it does otherwise.

    Attributes:
        keep: how much of the prompt stays: a float is a ratio of the real tokens, an int a number
            of tokens per layer. A ratio of 1.0 or more (5.0 is one, not five tokens), or a number
            of at least the prompt's length, evicts nothing. A method whose own rule finds the
            number (`sets_budget`) takes it as the most that may stay, and None for no limit.
        num_sink: the first tokens of every sequence stay in every layer and KV head, counted
            inside `keep`; where `keep` is smaller, its number of first tokens.
        head_reduction: whose attention makes a list, hence how many lists a layer has.
        statistic: what is taken over the rows that vote.
        sets_budget: the method has a rule of its own for how much stays.

    Raises:
        ValueError: if `keep` is not positive or not a number, or a count is negative.
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.GROUP_MEAN
    statistic: ClassVar[Statistic] = Statistic.SUM
    sets_budget: ClassVar[bool] = False

    keep: float | int | None
    num_sink: int = 4

    def __post_init__(self) -> None:
        own_rule = self.keep is None and self.sets_budget
        is_number = isinstance(self.keep, Real) and not isinstance(self.keep, bool)
        if not own_rule and not (is_number and float(self.keep or 0) > 0):
            raise ValueError(
                f"{type(self).__name__}: keep must be a positive ratio (float) or number of tokens "
                f"(int), got {self.keep!r}"
            )
        self._require_count("num_sink", minimum=0)

    def _require_count(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
            raise ValueError(
                f"{type(self).__name__}: {name} must be an int of at least {minimum}, got {value!r}"
            )

    def _require_fraction(self, name: str) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not 0 <= float(value) <= 1:
            raise ValueError(f"{type(self).__name__}: {name} must be in [0, 1], got {value!r}")

    def _require_one_of(self, name: str, words: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in words:
            allowed = " or ".join(repr(word) for word in words)
            raise ValueError(f"{type(self).__name__}: {name} must be {allowed}, got {value!r}")

    def keep_ratio(self, prompt: Prompt) -> Tensor:
        """Return `keep` as a ratio of each sequence's tokens [batch_size] float64, at most 1."""
        totals = prompt.totals.double()
        if isinstance(self.keep, Integral):
            return (float(self.keep) / totals.clamp(min=1)).clamp(max=1.0)
        return torch.full_like(totals, 1.0 if self.keep is None else min(float(self.keep), 1.0))

    def keep_tokens(self, prompt: Prompt) -> Tensor:
        """Return `keep` as a number of tokens per sequence [batch_size] int64, rounded down.

        At least 1, and at most the real keys.
        """
        totals = prompt.totals
        if isinstance(self.keep, Integral):
            tokens = torch.full_like(totals, int(self.keep))
        else:
            # The nudge keeps 0.29 * 100 at 29.
            tokens = (totals.double() * self.keep_ratio(prompt) + 1e-6).long()
        return torch.minimum(tokens.clamp(min=1), prompt.lens)

    def row_index(self, prompt: Prompt) -> Tensor | None:
        """Let every row vote; see `PrefillPolicy.row_index`."""
        return None

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        *,
        sm_scale: float | None = None,
        softmax_lse: Tensor | None = None,
    ) -> LayerScores:
        """Score by the attention from the rows that vote [batch_size, num_lists, kv_len]."""
        scores = ops.score_keys(
            query,
            key,
            row_index=self.row_index(prompt) if row_index is None else row_index,
            softmax_lse=softmax_lse,
            key_mask=prompt.key_mask,
            sm_scale=sm_scale,
            statistic=self.statistic,
            head_reduction=self.head_reduction,
        )
        return LayerScores(scores=scores, prompt=prompt)

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Leave the scores as they are; see `PrefillPolicy.revise`."""
        return layers

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Give every layer the same number of tokens [num_layers, batch_size] int64."""
        return torch.stack([self.keep_tokens(layer.prompt) for layer in layers])

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Return the class of every key uint8, as `build_priority` does.

        Args:
            prompt: the keys.
            budget: [batch_size] or [batch_size, num_lists] int64, what the layer may keep.

        Returns:
            [batch_size, kv_len], or [batch_size, num_lists, kv_len] where lists differ.
        """
        return self.force(prompt, budget if budget.dim() == 1 else budget.amin(1))

    def force(
        self,
        prompt: Prompt,
        budget: Tensor,
        *,
        num_recent: Tensor | int = 0,
        preferred: Tensor | None = None,
    ) -> Tensor:
        """Return classes in which the newest keys and the sinks are forced, as far as they fit.

        Args:
            prompt: the keys.
            budget: [batch_size] int64, what has to hold them: at most its newer half are newest
                keys, the sinks get what these leave.
            num_recent: how many of the newest keys, one number or [batch_size] int64.
            preferred: [batch_size, kv_len] bool, as in `build_priority`.
        """
        recent = torch.minimum((budget + 1) // 2, torch.as_tensor(num_recent, device=budget.device))
        return build_priority(
            prompt.valid,
            num_sink=(budget - recent).clamp(max=self.num_sink),
            num_recent=recent,
            preferred=preferred,
        )

    def num_forced(self, prompt: Prompt) -> Tensor:
        """Return how many keys do not compete at a budget of `keep` [batch_size] int64."""
        return (self.priority(prompt, self.keep_tokens(prompt)) == FORCED).sum(1)

    def ranking(self, layer: LayerScores, priority: Tensor) -> Tensor:
        """Return the scores that select inside a class, `layer.scores` unless overridden."""
        return layer.scores

    def select(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Keep the best `budget` keys by (priority, score); see `PrefillPolicy.select`."""
        priority = self.priority(layer.prompt, budget)
        scores = self.ranking(layer, priority)
        return select_ranked(scores, priority, budget, k)


def select_ranked(
    scores: Tensor, priority: Tensor, budget: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Keep the best `budget` [batch_size] or [batch_size, num_lists] keys of every list."""
    per_list = budget if budget.dim() == 2 else budget[:, None].expand(-1, scores.shape[1])
    row_k = per_list.to(torch.int32).contiguous()
    return ops.select_topk(scores, k, row_k=row_k, priority=priority)


def select_layers(
    policy: PrefillPolicy, layers: Sequence[LayerScores]
) -> tuple[Selection, ...] | None:
    """Turn the scores of all layers into the keys that stay.

    Returns:
        One `Selection` per layer, or None where nothing at all is evicted: the cache then stays as
        it is, padding included. Reading the budgets synchronizes with the device, once.
    """
    if not layers:
        return None
    layers = policy.revise(layers)
    lens = torch.stack([layer.prompt.lens for layer in layers])
    budgets = policy.budgets(layers).to(lens.device, torch.int64)
    most_possible = lens if budgets.dim() == 2 else lens[..., None]
    budgets = torch.minimum(budgets, most_possible)
    if budgets.numel() == 0:
        return None
    per_layer, evicted = budgets.flatten(1), (budgets < most_possible).flatten(1)
    most, least, evicts = torch.stack(
        [per_layer.amax(1), per_layer.amin(1), evicted.any(1).long()]
    ).tolist()
    if not any(evicts):
        return None
    selections = []
    for layer, budget, k, fewest in zip(layers, budgets, most, least, strict=True):
        kept_indices, kept_lens = policy.select(layer, budget, k)
        selections.append(
            Selection(
                kept_indices,
                kept_lens,
                keeps_all=fewest == layer.prompt.kv_len,
                ragged=fewest < k,
            )
        )
    return tuple(selections)


def observer(policy: PrefillPolicy, first: LayerScores | None) -> Callable[..., LayerScores]:
    """Return what scores the next layer.

    Args:
        policy: the policy.
        first: the scores of the first layer, None for itself.
    """
    if first is not None and isinstance(policy, SharingPolicy):
        return partial(policy.observe_later, first)
    return policy.observe


def compact_layers(
    keys: Sequence[Tensor], values: Sequence[Tensor], selections: Sequence[Selection]
) -> tuple[list[Tensor], list[Tensor]]:
    """Copy the kept keys and values of all layers into fresh, exactly sized tensors.

    One `gather_kv` call per distinct k: layers with different budgets get tensors of different
    lengths. A layer that keeps everything is returned as it is.

    Args:
        keys: one [batch_size, num_kv_heads, kv_len, head_dim] per layer.
        values: like keys.
        selections: one per layer.
    """
    kept_keys, kept_values = list(keys), list(values)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, selection in enumerate(selections):
        if not selection.keeps_all:
            shape = (*selection.kept_indices.shape, *keys[i].shape)
            groups.setdefault(shape, []).append(i)
    for members in groups.values():
        new_keys, new_values = ops.gather_kv(
            [keys[i] for i in members],
            [values[i] for i in members],
            torch.stack([selections[i].kept_indices for i in members]),
            torch.stack([selections[i].kept_lens for i in members]),
        )
        for i, new_key, new_value in zip(members, new_keys, new_values, strict=True):
            kept_keys[i], kept_values[i] = new_key, new_value
    return kept_keys, kept_values
