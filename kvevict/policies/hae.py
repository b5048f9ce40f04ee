"""HAE: hierarchical adaptive eviction (arXiv 2602.02197): pruned by layer 0, then a recycle bin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.policies._lists import in_list
from kvevict.policies._shares import keep_whole
from kvevict.policies.base import IMAGE, VIDEO, LayerScores, Policy, Prompt, select_layers
from kvevict.policies.between import Shortening
from kvevict.policies.decode import (
    Victims,
    accumulate,
    evictable,
    limit_lists,
    lowest,
    over_limit,
)
from kvevict.policies.limit import fitting

if TYPE_CHECKING:
    from kvevict.slots import Slots


@dataclass(frozen=True, eq=False, kw_only=True)
class PrunedScores(LayerScores):
    """Scores beside what layer 0 has decided.

    Attributes:
        victims: [batch_size, kv_len] bool, keys that go.
        order: [batch_size, 1, kv_len] float32, the scores of layer 0.
    """

    victims: Tensor
    order: Tensor


@dataclass(frozen=True)
class HAE(Policy):
    r"""Layer 0 decides which vision keys no layer keeps; while decoding, keys leave in batches.

    The official repository holds no code; what is not in the paper's abstract or its public reviews
    is defined here.

    Dual-Attention Pruning. P is the attention of layer 0, averaged over all query heads, from the
    text rows after the last vision token. Vision key j goes if both $\sum_i P[i,j] < r \sum_k
    \sum_i P[i,k]$ over the vision keys k, and $\max_i P[i,j] < \alpha$; of more than `max_evicted`
    such keys those with the smallest sums, but never all. The list holds for all layers and heads,
    and is applied in one compaction. Text and sinks never go. All rows vote where no text follows
    the vision.

    Dynamic Decoding Eviction. Attention accumulates over steps, the mean over all query heads. A
    key beyond `limit` goes into a recycle bin: it still takes part and may come back while another
    one deserves the bin more; when the bin holds `bin_len` keys, they are deleted at once. That is
    the same as to let the cache grow to `limit + bin_len` and then to delete the `bin_len` lowest
    sums: one selection and one compaction in `bin_len` steps, no marks. 1 is H2O's greedy rule.

    Attributes:
        keep: at most this much of the prompt stays (float) or this many tokens (int), text before
            vision; None = no limit. A prompt that fits into it stays whole.
        num_sink: first tokens that always stay.
        ratio: r; a uniform share is one over the number of vision keys, so r = 0.0015 suits images
            of about 576 of them.
        kappa: r as a multiple of the uniform share, in place of `ratio`; 0.86 is the same for 576.
        alpha: the largest attention that a key may get from one row and still go.
        max_evicted: vision keys that may go, per sequence, sinks among them; None = any number.
        drop_hidden: also take the pruned rows out of the hidden states behind layer 0. Saves
            computing, and changes the keys of later layers.
        limit: keys that stay while decoding; None = as many as after the prompt.
        bin_len: keys that are deleted at once.
        num_recent: newest keys that the bin does not get.
        decay: factor of the sums at every step.
        scope: "per_layer" deletes what each layer's own sums say, "layer0" what those of layer 0
            say, "mean" what their mean over all layers says. The last two have one list for all.
        vision_first: delete vision before text, whatever the sums.
        decode: "evict", or "append" to leave the cache alone after the prompt.
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN
    sets_budget: ClassVar[bool] = True

    keep: float | int | None = None
    ratio: float = 0.0015
    kappa: float | None = None
    alpha: float = 0.001
    max_evicted: int | None = None
    drop_hidden: bool = False
    limit: int | None = None
    bin_len: int = 64
    num_recent: int = 32
    decay: float = 1.0
    scope: Literal["per_layer", "layer0", "mean"] = "per_layer"
    vision_first: bool = False
    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ratio", "kappa", "alpha", "decay"):
            self._require_at_least_0(name)
        self._require_count("bin_len", minimum=1)
        self._require_count("num_recent", minimum=0)
        for name, minimum in (("max_evicted", 0), ("limit", 1)):
            if getattr(self, name) is not None:
                self._require_count(name, minimum=minimum)
        self._require_one_of("scope", ("per_layer", "layer0", "mean"))
        self._require_one_of("decode", ("evict", "append"))

    def _require_at_least_0(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "kappa":
            return
        if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
            raise ValueError(f"HAE: {name} must be a number of at least 0, got {value!r}")

    # The prompt

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the text rows after the last vision token, all rows where there are none."""
        return prompt.trailing_rows()

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
    ) -> PrunedScores:
        """Score layer 0 and prune."""
        rows = self.row_index(prompt) if row_index is None else row_index
        layer = super().observe(
            query, key, value, prompt, rows, sm_scale=sm_scale, softmax_lse=softmax_lse
        )
        maxima = ops.score_keys(
            query,
            key,
            row_index=rows,
            softmax_lse=softmax_lse,
            key_mask=prompt.key_mask,
            sm_scale=sm_scale,
            statistic=Statistic.MAX,
            head_reduction=self.head_reduction,
        )
        victims = self._prune(layer.scores, maxima, prompt)
        return PrunedScores(scores=layer.scores, prompt=prompt, victims=victims, order=layer.scores)

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
    ) -> PrunedScores:
        """Take over what layer 0 has decided; see `SharingPolicy`."""
        assert isinstance(first, PrunedScores)
        victims, order, scores = first.victims, first.order, first.scores
        if self._was_shortened(first.prompt, prompt):
            victims = torch.zeros_like(prompt.valid)
            order = scores = torch.zeros(prompt.valid.shape, device=key.device)[:, None]
        if self.decode == "evict" and self.scope != "layer0":
            layer = super().observe(
                query, key, value, prompt, row_index, sm_scale=sm_scale, softmax_lse=softmax_lse
            )
            scores = layer.scores
        return PrunedScores(scores=scores, prompt=prompt, victims=victims, order=order)

    def _was_shortened(self, first: Prompt, prompt: Prompt) -> bool:
        """Return whether rows were taken out behind layer 0; a later turn takes none out."""
        whole = prompt.num_queries == prompt.kv_len
        return self.drop_hidden and whole and prompt is not first

    def _prune(self, sums: Tensor, maxima: Tensor, prompt: Prompt) -> Tensor:
        """Return the keys that go [batch_size, kv_len] bool."""
        vision, kv_len = prompt.is_vision, prompt.kv_len
        kept_indices, _ = ops.select_threshold(
            sums,
            maxima,
            vision,
            ratio=self.ratio if self.kappa is None else None,
            kappa=self.kappa,
            alpha=self.alpha,
            max_evicted=self.max_evicted,
            key_mask=prompt.key_mask,
        )
        gone = vision & ~in_list(kept_indices[:, 0], kv_len)
        # One always stays: the one with the largest sum.
        place = torch.arange(kv_len, device=sums.device)
        best = sums[:, 0].where(vision, -1.0).max(1, keepdim=True).indices if kv_len else place
        gone &= (gone != vision).any(1, keepdim=True) | (place != best)
        return gone & (prompt.rank_from_start >= self.num_sink)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Keep what is not pruned, at most `keep` [num_layers, batch_size] int64."""
        kept = []
        for layer in layers:
            assert isinstance(layer, PrunedScores)
            left = layer.prompt.lens - layer.victims.sum(1)
            kept.append(torch.minimum(left, self.keep_tokens(layer.prompt)))
        return keep_whole(self, layers, torch.stack(kept))

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Return the classes: padding, vision, text, sinks, in rising order."""
        return self.force(prompt, budget, preferred=~prompt.is_vision)

    def ranking(self, layer: LayerScores, priority: Tensor) -> Tensor:
        """Return the sums of layer 0, those of the keys that go last."""
        assert isinstance(layer, PrunedScores)
        return layer.order.masked_fill(layer.victims[:, None], -1.0)

    # Between layers

    def shortening_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return layer 0, or nothing."""
        return (0,) if self.drop_hidden else ()

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
        """Take the pruned rows out."""
        assert scores is not None
        selections = select_layers(self, [scores])
        return None if selections is None else Shortening(selections[0])

    # While decoding

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether there is a bin."""
        return self.decode == "evict"

    def begin_decoding(self, layers: Sequence[Slots], scores: Sequence[LayerScores]) -> None:
        """Set the limit of every list."""
        limits = [slots.lens for slots in layers]
        if self.limit is not None:
            limits = [torch.full_like(limit, self.limit) for limit in limits]
        for i, limit in enumerate(limit_lists(layers, limits)):
            layers[i].memory.update(limit=limit, is_watched=int(i == 0 or self.scope != "layer0"))

    def observe_step(
        self,
        slots: Slots,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """Add the attention of the newest rows to the sums."""
        if slots.memory["is_watched"]:
            accumulate(slots, query, decay=self.decay, key_mask=key_mask, sm_scale=sm_scale)

    def evict_step(self, layers: Sequence[Slots]) -> list[Victims | None]:
        """Return what the bin holds, once it is full."""
        if self.scope == "per_layer":
            return [self._empty_bin(slots, None) for slots in layers]
        mean = None
        if self.scope == "mean" and over_limit(layers[0], at_least=self.bin_len)[1] > 0:
            mean = torch.stack([slots.scores for slots in layers]).mean(0)
        return [self._empty_bin(layers[0], mean)] * len(layers)

    def _empty_bin(self, slots: Slots, scores: Tensor | None) -> Victims | None:
        count, most = over_limit(slots, at_least=self.bin_len)
        if most == 0:
            return None
        limit = slots.memory["limit"]
        assert not isinstance(limit, float)
        num_sink = fitting(self.num_sink, limit)
        classes = evictable(slots, num_sink, fitting(self.num_recent, limit - num_sink)).byte()
        if self.vision_first:
            classes = classes * (1 + _is_vision(slots.modality))
        return lowest(slots.scores if scores is None else scores, classes, count, most)


def _is_vision(modality: Tensor) -> Tensor:
    return ((modality == IMAGE) | (modality == VIDEO)).byte()
