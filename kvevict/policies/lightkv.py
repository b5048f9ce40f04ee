"""LightKV: vision tokens merged inside the prompt, guided by the text (arXiv 2605.00789)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction
from kvevict.policies._lists import in_list, part_of
from kvevict.policies.base import LayerScores, Prompt, Selection
from kvevict.policies.between import Shortening

DEPTHS = (3 / 8, 9 / 16, 3 / 4)
"""Of the published stages, as shares of the model's layers."""


@dataclass(frozen=True)
class LightKV:
    r"""Behind chosen layers vision tokens are merged into similar neighbors; nothing is evicted.

    Later layers run on fewer rows, so they compute and store less; the layers up to a stage keep
    all of theirs. At a stage, per image of n tokens:

    - guidance: $\omega_i = \sum_h \sum_j c_h[i,j]$ over the text keys j, where $c_h[\cdot,j]$ is
      the softmax over all rows i of the logits $q_i k_j$ without a mask: text keys attend to rows.
      A template's text counts, too;
    - windows: the n tokens, written as a square of side $\lceil\sqrt n\rceil$, are cut into
      `window` parts per side. (This is a shape of the list, not the grid of the image.) In each
      window the 1st, 3rd, ... token is a source, the others are targets;
    - merging: each source has its most similar target (cosine of the hidden states); of m tokens,
      the `int(drop * m)` sources that are most similar to theirs, half of m at most, are merged
      into it, $x_b \leftarrow (\omega_b x_b + \sum_a \omega_a x_a) / (\omega_b + \sum_a \omega_a)$.

    A sequence with an image of fewer than 8 `window`² tokens is left alone at that stage. An image
    is a run of image (or video) tokens, so images need something between them. They may differ in
    size; every sequence is merged for itself.

    Defined here where the released code is silent, or does what the paper does not say:

    - the code for LLaVA overwrites the logits with random numbers, which makes the merge a plain
      mean: `guidance="uniform"`. The default is what the paper says, and the code for Qwen does;
    - equal similarities: the lower position is merged first;
    - where all weights of a group are zero, the plain mean.

    Attributes:
        merge_layers: the layers behind which tokens are merged, one per stage. None = at 3/8, 9/16
            and 3/4 of the model's depth: layers 12, 18 and 24 of 32, as released for LLaVA. For the
            28 layers of Qwen2.5-VL (12, 17, 22) is released, with windows (6, 4, 2).
        windows: windows per side of an image, for every stage, or one for all.
        drop: the share of the tokens that goes at a stage, for every stage, or one for all.
        guidance: weights of the mean: "text" or "uniform".
        restart_positions: rows are numbered anew behind a stage, on all axes of M-RoPE alike; else
            they keep their positions.
        decode_positions: where rows were numbered anew, the tokens after the prompt stand at their
            place in the "conversation", as released, or follow the "stored" rows.
    """

    merge_layers: tuple[int, ...] | None = None
    windows: tuple[int, ...] = (4, 2, 1)
    drop: tuple[float, ...] = (0.5, 0.5, 0.5)
    guidance: Literal["text", "uniform"] = "text"
    restart_positions: bool = True
    decode_positions: Literal["conversation", "stored"] = "conversation"

    def __post_init__(self) -> None:
        for name in ("merge_layers", "windows", "drop"):
            value = getattr(self, name)
            if not isinstance(value, tuple) and (value is not None or name != "merge_layers"):
                raise ValueError(f"LightKV: {name} must be a tuple, got {value!r}")
        layers = self.merge_layers
        if layers is not None and (
            not layers
            or any(isinstance(i, bool) or not isinstance(i, int) for i in layers)
            or list(layers) != sorted({*layers})
            or layers[0] < 0
        ):
            raise ValueError(
                f"LightKV: merge_layers must be ints that ascend from at least 0, got {layers}"
            )
        num_stages = len(DEPTHS if layers is None else layers)
        for name in ("windows", "drop"):
            values = getattr(self, name)
            if len(values) not in (1, num_stages):
                raise ValueError(
                    f"LightKV: {name} must have 1 or {num_stages} values, got {values}"
                )
        check_windows("LightKV", self.windows)
        if any(not isinstance(d, Real) or not 0 <= d <= 1 for d in self.drop):
            raise ValueError(f"LightKV: drop must be in [0, 1], got {self.drop}")
        for name, words in (
            ("guidance", ("text", "uniform")),
            ("decode_positions", ("conversation", "stored")),
        ):
            if getattr(self, name) not in words:
                allowed = " or ".join(map(repr, words))
                raise ValueError(f"LightKV: {name} must be {allowed}, got {getattr(self, name)!r}")

    def shortening_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return `merge_layers`, or those of its default.

        Raises:
            ValueError: if the model has fewer layers, or fewer than 4 where they are by default.
        """
        layers = self.merge_layers
        if layers is None:
            layers = tuple(int(num_layers * depth) for depth in DEPTHS)
        if layers[-1] >= num_layers or len({*layers}) < len(layers):
            raise ValueError(
                f"LightKV: merge_layers must be different layers below {num_layers}, the number of "
                f"the model's, got {layers}"
            )
        return layers

    @torch.no_grad()
    def shorten(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        prompt: Prompt,
        *,
        stage: int,
        scores: LayerScores | None = None,
        sm_scale: float | None = None,
    ) -> Shortening | None:
        """Merge. Synchronizes with the device for the number of rows that are left."""
        plan = plan_windows(
            prompt, self.windows[stage % len(self.windows)], self.drop[stage % len(self.drop)]
        )
        kv_len = prompt.kv_len
        source, target = plan.members(odd=False), plan.members(odd=True)
        match, similarity = ops.match_tokens(
            hidden_states[:, None],
            source[:, None],
            target[:, None],
            source_group=plan.group[:, None],
            target_group=plan.group[:, None],
        )
        chosen = plan.most_similar(similarity[:, 0])
        merged = hidden_states.clone()
        weight = self.weigh(query, key, prompt, sm_scale)
        matched = match[:, 0].where(chosen, -1)
        ops.merge_tokens_([merged[:, None]], source[:, None], matched[:, None], weight)

        kept = prompt.valid & ~in_list(source.where(chosen, -1), kv_len)
        lens = kept.sum(1)
        counts: list[list[int]] = torch.stack([lens, prompt.lens]).tolist()
        if counts[0] == counts[1]:
            return None
        k = max(counts[0])
        selection = Selection(
            *ops.select_topk(
                torch.zeros_like(similarity[..., :1]).expand(-1, -1, kv_len).contiguous(),
                k,
                row_k=lens[:, None].int(),
                priority=kept.byte(),
            ),
            ragged=min(counts[0]) < k,
        )
        return Shortening(
            selection,
            merged,
            restarted=lens < prompt.lens if self.restart_positions else None,
            restart_decoding=self.decode_positions == "stored",
        )

    def weigh(self, query: Tensor, key: Tensor, prompt: Prompt, sm_scale: float | None) -> Tensor:
        """Return omega, the weight of every row [batch_size, 1, kv_len] float32.

        Args:
            query: see `LayerPolicy.shorten`.
            key: likewise.
            prompt: likewise.
            sm_scale: likewise.
        """
        batch_size, _, kv_len, _ = query.shape
        if self.guidance == "uniform":
            return torch.ones(batch_size, 1, kv_len, device=query.device)
        # Roles swapped: the text keys are the rows of attention, all queries are its keys.
        text = prompt.rows_of(prompt.valid & ~prompt.is_vision)
        num_kv_heads = key.shape[1]
        groups = query.view(batch_size, num_kv_heads, -1, *query.shape[2:]).unbind(2)
        means = [
            ops.score_keys(
                key,
                of_group,
                row_index=text,
                key_mask=prompt.key_mask,
                sm_scale=sm_scale,
                causal=False,
                head_reduction=HeadReduction.ALL_MEAN,
            )
            for of_group in groups
        ]
        return torch.stack(means).sum(0) * num_kv_heads


def check_windows(policy_name: str, windows: tuple[int, ...]) -> None:
    """Refuse what are no parts per side of an image.

    Raises:
        ValueError: naming the policy, the field and its value.
    """
    if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in windows):
        raise ValueError(f"{policy_name}: windows must be ints of at least 1, got {windows}")


@dataclass(frozen=True, eq=False)
class Windows:
    """The vision tokens of a batch by window; entry i is a token, in order of window and position.

    Attributes:
        position: [batch_size, kv_len] int32, the token of an entry; -1 = none, behind the others.
        group: like position, its window, ascending.
        rank: like position int64, how many tokens of the window come before it.
        num_dropped: like position int64, how many sources of the window are to be merged.
    """

    position: Tensor
    group: Tensor
    rank: Tensor
    num_dropped: Tensor

    def members(self, *, odd: bool) -> Tensor:
        """Return the entries of odd or even rank, -1 in place of the others."""
        return self.position.where(self.rank % 2 == int(odd), -1)

    def most_similar(self, similarity: Tensor) -> Tensor:
        """Return the sources to be merged [batch_size, kv_len] bool.

        Args:
            similarity: [batch_size, kv_len] float32 of the entries, -inf where there is no source.
        """
        # Integers in the order of floats; -0 and 0 are equal.
        bits = (similarity + 0.0).view(torch.int32)
        ordered = bits.where(bits >= 0, bits ^ 0x7FFFFFFF).long()
        ordered = ordered.masked_fill(similarity.isnan(), torch.iinfo(torch.int32).min)
        key = self.group.long() * 2**33 - ordered
        order = key.sort(dim=1, stable=True).indices.argsort(1)
        # Rank among all entries minus entries of earlier windows; sources come first in theirs.
        first = torch.arange(order.shape[1], device=order.device) - self.rank
        is_source = (self.position >= 0) & (self.rank % 2 == 0)
        return is_source & (order - first < self.num_dropped)


def plan_windows(prompt: Prompt, window: int, drop: float) -> Windows:
    """Cut the images of every sequence into window x window parts.

    Args:
        prompt: the rows.
        window: parts per side.
        drop: the share of a window's tokens that is to be merged.
    """
    kind = prompt.modality.where(prompt.is_vision, -1).int()
    place = torch.arange(prompt.kv_len, device=kind.device).expand_as(kind)
    first, length = _runs(kind)
    side = length.double().sqrt().ceil().long()
    token = place - first
    group = (first * window + part_of(token // side, side, window)) * window
    group = group + part_of(token % side, side, window)
    is_small = prompt.is_vision & (length < 8 * window**2)
    takes_part = prompt.is_vision & ~is_small.any(1, keepdim=True)
    none = prompt.kv_len * window**2
    group, position = group.where(takes_part, none).sort(dim=1, stable=True)
    start, size = _runs(group)
    return Windows(
        position.where(group < none, -1).int(),
        group.int(),
        place - start,
        torch.minimum((size.double() * drop).long(), size // 2),
    )


def _runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return begin and length of the run of equal values around each entry, both like `values`."""
    place = torch.arange(values.shape[1], device=values.device).expand_as(values)
    changes = torch.ones_like(values[:, :1], dtype=torch.bool)
    changes = torch.cat([changes, values[:, 1:] != values[:, :-1]], 1)
    begin = place.where(changes, 0).cummax(1).values
    is_last = torch.cat([changes[:, 1:], torch.ones_like(changes[:, :1])], 1)
    end = place.where(is_last, values.shape[1]).flip(1).cummin(1).values.flip(1)
    return begin, end - begin + 1
