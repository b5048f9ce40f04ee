"""TGV-KV: text-grounded eviction for vision-language models (arXiv 2606.03075, ICML 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction
from kvevict.policies._shares import share_by_mass
from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.policies.decode import Victims, evictable, lowest, received, shared_ints
from kvevict.priority import build_priority

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True)
class TGVKV(Policy):
    r"""Text decides: which layers get the budget, which vision keys stay, and text stays first.

    Let t be the T text rows after the last vision token, v the vision keys, A the attention of a
    layer averaged over all its query heads. Then, per sequence:

    - TVB, the layer budgets: $m_l = \sum_{i \in t} \sum_{j \in v} A_l[i,j]$, and layer l keeps
      $f_l = L \cdot keep \cdot m_l / \sum m$ of the N prompt tokens;
    - TWR, the vision scores: $s[j] = \sum_{i \in t} w_i A[i,j]$, where $w_i$ is the mean attention
      that text key i gets from the text rows that can see it;
    - TPR, the order: every text key goes before every vision key; text keys are ranked by their
      column sum. It is a priority class, not a constant added to a score.

    One list per layer and sequence, shared by all heads. All budgets are inside `keep`: layer l
    keeps exactly `num_sink + num_recent + max(0, N - num_sink - num_recent - drop_l)` tokens,
    `drop_l = max(0, round_half_even(N * (1 - f_l)))`. So the forced tokens stay even where a
    layer's share is smaller, and a layer that would get more than N keeps N.

    Defined here where the paper and its code are silent:

    - a sequence with no text after its vision has no rows t: every row votes, plain column sums
      rank the keys, and the layers share evenly;
    - a text-only sequence is left whole, as the released code does, and so is one of which less
      than one whole token would go;
    - several images, video spans and separators between them: "vision" is the modality of each
      token, never a contiguous span;
    - everything is per sequence; padding neither votes nor stays.

    Decoding appends; nothing is evicted after the prompt. The released code does more than the
    paper says, `decode="released"`: with n keys stored and M tokens seen so far, a layer of which
    $n - M f_l \ge 1$ drops one key per step, the one that the newest row pays the least attention
    to (the mean over all heads), except for sinks and the newest keys, as many as the text after
    the vision had kept. So its cache still grows by $f_l$ per token, and that text becomes
    evictable as it ages. Sequences that the prompt's eviction left whole are left alone.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer on average (int).
        num_sink: first tokens that always stay, whatever their modality (4 in the released code).
        num_recent: last tokens that always stay (1 in the released code).
        text_score: rows behind the column sums of text keys: "paper" the rows t, "released" all
            rows (differs for text before the vision; one O(kv_len^2) scoring pass per layer).
        redistribute: give what layers with f_l > 1 cannot use to the others, in proportion to
            their mass (water filling). Off in the paper and in its code, where it is lost.
        decode: "paper" appends, "released" also drops.
    """

    num_recent: int = 1
    text_score: Literal["paper", "released"] = "paper"
    redistribute: bool = False
    decode: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("num_recent", minimum=0)
        self._require_one_of("text_score", ("paper", "released"))
        self._require_one_of("decode", ("paper", "released"))

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the text rows after the last vision token."""
        return prompt.rows_of(prompt.trailing_text)

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
        """Compute the TWR scores of vision keys, the column sums of text keys and the mass m_l."""
        rows = self.row_index(prompt) if row_index is None else row_index
        weighted, column_sums, _ = ops.score_keys_by_text(
            query,
            key,
            rows,
            softmax_lse=softmax_lse,
            key_mask=prompt.key_mask,
            sm_scale=sm_scale,
        )
        fallback = prompt.lacks_trailing_text
        text_scores = column_sums
        if self.text_score == "released" or prompt.some_lack_trailing_text:
            sums_of_all_rows = ops.score_keys(
                query,
                key,
                softmax_lse=softmax_lse,
                key_mask=prompt.key_mask,
                sm_scale=sm_scale,
                head_reduction=HeadReduction.ALL_MEAN,
            )
            column_sums = sums_of_all_rows.where(fallback[:, None, None], column_sums)
            text_scores = sums_of_all_rows if self.text_score == "released" else column_sums
        vision_scores = column_sums.where(fallback[:, None, None], weighted)
        vision_mass = (column_sums[:, 0] * prompt.is_vision).sum(1)
        return LayerScores(
            scores=vision_scores.where(prompt.is_vision[:, None], text_scores),
            prompt=prompt,
            mass=vision_mass.masked_fill(fallback, 0.0),
        )

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Share the budget by the attention that text pays to vision (TVB), in float64."""
        lens = torch.stack([layer.prompt.lens for layer in layers]).double()
        totals = torch.stack([layer.prompt.totals for layer in layers]).double()
        ratio = torch.stack([self.keep_ratio(layer.prompt) for layer in layers])
        fraction = share_by_mass(self, layers, redistribute=self.redistribute)
        drop = (lens * (1 - fraction)).round().clamp(min=0)
        forced = lens.clamp(max=float(self.num_sink + self.num_recent))
        kept = forced + (lens - forced - drop).clamp(min=0)

        text_only = torch.stack([~layer.prompt.is_vision.any(1) for layer in layers])
        nothing_to_drop = lens - totals * ratio < 1 - 1e-9
        return kept.where(~(text_only | nothing_to_drop), lens).long()

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Return the classes: padding, vision, text, sinks and recent tokens, in rising order."""
        return build_priority(
            prompt.valid,
            num_sink=self.num_sink,
            num_recent=self.num_recent,
            preferred=~prompt.is_vision,
        )

    # While decoding, as released

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether it does as the released code."""
        return self.decode == "released"

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Remember f_l, and how much of the text after the vision was kept."""
        prompt_lens = torch.stack([layer.prompt.lens for layer in scores])
        prompt_totals = torch.stack([layer.prompt.totals for layer in scores])
        fraction = share_by_mass(self, scores, redistribute=self.redistribute)
        fraction = fraction * prompt_lens / prompt_totals.clamp(min=1)
        left_whole = (self.budgets(scores) == prompt_lens).all(0)
        fraction = fraction.masked_fill(left_whole, torch.inf)
        lens = [slots.lens for slots in layers]
        totals = [total.view_as(n) for total, n in zip(prompt_totals, lens, strict=True)]
        suffix = [
            _num_from(slots, _text_from(layer.prompt).view_as(n)).clamp(min=1)
            for slots, layer, n in zip(layers, scores, lens, strict=True)
        ]
        shared = [shared_ints(counts) for counts in (lens, totals, suffix)]
        fractions: list[list[float]] = fraction.tolist()
        for i, slots in enumerate(layers):
            counts = [values[i] for values in shared]
            if len(set(fractions[i])) == 1 and all(isinstance(c, int) for c in counts):
                slots.memory["fraction"] = fractions[i][0]
            else:
                counts = [lens[i], totals[i], suffix[i]]
                slots.memory["fraction"] = fraction[i].view_as(lens[i])
            slots.memory.update(zip(("lens", "totals", "suffix"), counts, strict=True))
            slots.memory["seen_len"] = slots.seen_len

    def observe_step(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """Take the newest row's attention for scores; nothing is accumulated."""
        newest = query[:, :, query.shape[2] - 1 :]
        slots.scores.copy_(received(slots, newest, key_mask=key_mask, sm_scale=sm_scale))

    def evict_step(self, layers: Sequence[Slots]) -> list[Victims | None]:
        """Return at most one key per list."""
        return [self._evict_layer(slots) for slots in layers]

    def _evict_layer(self, slots: Slots) -> Victims | None:
        memory = slots.memory
        suffix = memory["suffix"]
        assert not isinstance(suffix, float)
        num_stored = memory["lens"] + slots.grown
        count: int | Tensor
        num_seen: int | float | Tensor
        if isinstance(num_stored, Tensor):
            num_seen = slots.totals.view(-1, 1)
            count = (num_stored - num_seen * memory["fraction"] >= 1).long()
        else:
            num_seen = memory["totals"] + slots.seen_len - memory["seen_len"]
            is_due = num_stored - num_seen * memory["fraction"] >= 1
            count = int(bool(is_due) and num_stored > self.num_sink + suffix)
            if count == 0:
                return None
        candidates = evictable(slots, self.num_sink, 0) & ~_newest(slots, suffix)
        return lowest(slots.scores, candidates.byte(), count, 1)


def _text_from(prompt: Prompt) -> Tensor:
    """Return the position of the first text row after the vision [batch_size]; the end if none."""
    position = prompt.totals[:, None] - 1 - prompt.rank_from_end
    return position.where(prompt.trailing_text, prompt.totals[:, None]).amin(1)


def _num_from(slots: Slots, position: Tensor) -> Tensor:
    """Return how many keys stand at `position` [batch_size, num_lists] or behind it."""
    behind = slots.positions >= position[..., None]
    return (behind & (slots.columns >= 0)).sum(-1)


def _newest(slots: Slots, count: int | Tensor) -> Tensor:
    """Return the `count` newest keys of every list [batch_size, num_lists, stored] bool."""
    positions = slots.positions.where(slots.columns >= 0, -1)
    rank = positions.argsort(-1, descending=True).argsort(-1)
    return rank < (count[..., None] if isinstance(count, Tensor) else count)
