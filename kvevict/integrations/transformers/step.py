"""One forward through a decoder: attend, let the policy see, shorten, evict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvevict.channels import PackedSlots, attend_with_lse, pack_slots
from kvevict.integrations.transformers.attention import attend_blocks, attend_prompt
from kvevict.integrations.transformers.layer import EvictedLayer
from kvevict.integrations.transformers.reports import (
    EvictionReport,
    count_bytes,
    kept_of,
    modality_by_column,
)
from kvevict.integrations.transformers.rows import Rows
from kvevict.policies.base import (
    LayerScores,
    PrefillPolicy,
    Prompt,
    Selection,
    observer,
    select_layers,
)
from kvevict.policies.between import LayerPolicy
from kvevict.policies.channels import ChannelPolicy
from kvevict.policies.decode import DecodePolicy, begin_decoding
from kvevict.policies.merging import merge_layers
from kvevict.slots import LayerSlots, Slots, evict_layers, select_slots


class Step:
    """What happens between the decoder's first and last layer.

    Args:
        policy: what decides.
        cache: the model's cache, dynamic.
        num_new: new columns.
        every_turn: later turns are evicted, too.
        shortening: the layers behind which a `LayerPolicy` is asked, ascending.
        modality_of: gives the modality of the last columns, from (key, num_columns, seen_len).
        rotate: gives position embeddings, from (hidden_states, positions).
    """

    def __init__(
        self,
        policy: Any,
        cache: Any,
        num_new: int,
        *,
        every_turn: bool,
        shortening: Sequence[int],
        modality_of: Callable[[Tensor, int, int], Tensor],
        rotate: Callable[[Tensor, Tensor], Any],
    ) -> None:
        self.policy = policy
        self.cache = cache
        self.num_new = num_new
        self.is_first = cache.get_seq_length() == 0
        self.every_turn = every_turn
        self.decodes = isinstance(policy, DecodePolicy) and policy.evicts_while_decoding
        is_prompt = num_new > 1 or self.decodes
        self.evicts = (self.is_first and is_prompt) or (every_turn and num_new > 1)
        self.follows_shifts = len(shortening) > 0
        self.shortening = tuple(shortening) if self.is_first and num_new > 1 else ()
        self.modality_of = modality_of
        self.rotate = rotate
        self.mask: Tensor | None = None
        self.modality: Tensor | None = None
        self.rows: Rows | None = None
        self.hidden_states: Tensor | None = None
        # Of the rows as they are now; layers share it.
        self.prompt: tuple[Prompt, Tensor | None] | None = None
        # By layer.
        self.blocks: dict[int, Slots] = {}
        self.prompts: dict[int, tuple[Prompt, Tensor | None]] = {}
        self.scores: dict[int, LayerScores] = {}
        self.channels: dict[int, Tensor] = {}
        self.layer_rows: dict[int, Rows] = {}
        self.attended: dict[int, tuple[Tensor, Tensor, float | None]] = {}
        self._attach()

    # The cache

    def _attach(self) -> None:
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, EvictedLayer):
                layer.attached = True
                layer.unites = self.evicts
                if layer.decode_policy != self.policy:
                    layer.decode_policy = None
                if self.is_first:  # The cache was reset.
                    self.cache.layers[i] = DynamicLayer()
                elif layer.position_shift is not None and not self.follows_shifts:
                    raise ValueError(
                        "kvevict.evict: this cache numbers its tokens anew from some layer on; "
                        f"continue it under a policy that does so, not {self.policy!r}"
                    )
            elif self.shortening and type(layer) is not DynamicLayer:
                raise ValueError(
                    f"kvevict.evict: {type(self.policy).__name__} shortens the prompt between "
                    "layers, which a model with sliding-window or linear attention cannot follow"
                )

    def detach(self) -> None:
        """Close the evicted layers for everybody else."""
        for layer in self.cache.layers:
            if isinstance(layer, EvictedLayer):
                layer.attached = layer.unites = False

    def _decoding_layers(self) -> list[EvictedLayer]:
        return [
            layer
            for layer in self.cache.layers
            if isinstance(layer, EvictedLayer) and layer.decode_policy is not None
        ]

    # Attention

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend, and let the policy see it.

        Args:
            module: the attention module.
            query: [batch_size, num_qo_heads, qo_len, head_dim].
            key: [batch_size, num_kv_heads, kv_len, head_dim], what `update` of the cache returned.
            value: like key.
            mask: [batch_size, kv_len] bool of the conversation, or what SDPA wants in a
                sliding-window layer.
            **kwargs: handed to SDPA.

        Returns:
            [batch_size, qo_len, num_qo_heads, head_dim].
        """
        index = module.layer_idx
        layer = self.cache.layers[index] if index < len(self.cache.layers) else None

        def sdpa(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
            return sdpa_attention_forward(module, q, k, v, m, **kwargs)[0]  # type: ignore[no-any-return]

        if isinstance(layer, DynamicSlidingWindowLayer):
            return sdpa(query, key, value, mask)
        _check_full_attention(module, layer, query, key, mask)
        scaling = kwargs.get("scaling")
        if not isinstance(layer, EvictedLayer) and key.shape[2] == query.shape[2]:
            if self.rows is None:
                self.rows = Rows.of_prompt(key, mask)
            if self.evicts:
                self._see_prompt(index, query, key, value, scaling)
            return attend_prompt(sdpa, query, key, value, self.rows.spans)
        self.mask = mask
        if self.evicts:
            self._see_turn(index, layer, query, key, value, scaling)
        if not isinstance(layer, EvictedLayer):
            return attend_blocks(sdpa, query, key, value, None if mask is None else mask[:, None])
        if isinstance(layer.store, PackedSlots):
            sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return layer.store.attend(query, mask, partial(attend_with_lse, sm_scale=sm_scale))
        if layer.decode_policy is None:
            return layer.store.attend(query, mask, partial(attend_blocks, sdpa))
        slots = layer.store.slots
        visible = slots.visible(mask)
        with torch.no_grad():
            layer.decode_policy.observe_step(slots, query, key_mask=visible, sm_scale=scaling)
        return attend_blocks(sdpa, query, key, value, slots.biased(visible))

    # What the policy sees

    def _see_prompt(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> None:
        """Show a layer of the first prompt."""
        assert self.rows is not None
        if self.prompts and key.device != self.rows.padding_lens.device:
            raise ValueError("kvevict.evict: a model spread over several devices is not supported")
        if self.modality is None:
            self.modality = self.modality_of(key, self.num_new, self.num_new)
        if self.prompt is None:
            self.prompt = self._observable(self.rows.prompt(self.modality))
        self.prompts[index], self.layer_rows[index] = self.prompt, self.rows
        self._observe(index, query, key, value, scaling)
        if index in self.shortening:
            self.attended[index] = query, key, scaling

    def _see_turn(
        self,
        index: int,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
    ) -> None:
        """Show a layer with the keys of earlier turns."""
        if isinstance(layer, EvictedLayer):
            slots = layer.store.slots
            new = self.modality_of(key, self.num_new, slots.seen_len)
            slots.note_turn(new, self.mask)
        else:
            rows = Rows.of_prompt(key, self.mask)
            modality = self.modality_of(key, key.shape[2], key.shape[2])
            slots = _block_of(layer, rows, modality)
        self.blocks[index] = slots
        totals, columns, modality = slots.totals, slots.columns, slots.modality
        weights = slots.key_weight
        if _lists_per_head(self.cache):
            # Lists of an earlier turn differ between the KV heads: each is a sequence of its own.
            batch_size, num_kv_heads = key.shape[:2]
            query = query.reshape(batch_size * num_kv_heads, -1, *query.shape[2:])
            key, value = key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]
            columns, modality = (t.expand(-1, num_kv_heads, -1) for t in (columns, modality))
            totals = totals.repeat_interleave(num_kv_heads)
            if weights is not None:
                weights = weights.expand(-1, num_kv_heads, -1).flatten(0, 1)[:, None]
        prompt = Prompt(
            modality.flatten(0, 1).to(torch.int8),
            key_mask=columns.flatten(0, 1) >= 0,
            qo_len=self.num_new,
            total_lens=totals.long(),
            key_weight=weights,
        )
        self.prompts[index] = self._observable(prompt)
        self._observe(index, query, key, value, scaling)

    def _observable(self, prompt: Prompt) -> tuple[Prompt, Tensor | None]:
        is_prefill = isinstance(self.policy, PrefillPolicy)
        return prompt, self.policy.row_index(prompt) if is_prefill else None

    @torch.no_grad()
    def _observe(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> None:
        prompt, row_index = self.prompts[index]
        if isinstance(self.policy, ChannelPolicy):
            self.channels[index] = self.policy.channels(query, key, prompt)
        if not isinstance(self.policy, PrefillPolicy):
            scores = torch.zeros(prompt.modality.shape, device=key.device)[:, None]
            self.scores[index] = LayerScores(scores, prompt)
            return
        observe = observer(self.policy, next(iter(self.scores.values()), None))
        self.scores[index] = observe(query, key, value, prompt, row_index, sm_scale=scaling)

    # Between layers

    def before_layer(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the rows that were removed out of a layer's inputs."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        layer = self.cache.layers[index] if index < len(self.cache.layers) else None
        if isinstance(layer, EvictedLayer) and layer.position_shift is not None:
            positions = _shifted_positions(layer, hidden_states, kwargs["attention_mask"])
            embeddings = _restart(
                kwargs["position_embeddings"],
                self.rotate(hidden_states, positions),
                layer.restarted,
            )
            return args, {**kwargs, "position_embeddings": embeddings}
        rows = self.rows
        if rows is None or rows.index is None:
            return None
        self.hidden_states = hidden_states
        alive = rows.take(hidden_states, -2)
        embeddings = tuple(rows.take(t, -2) for t in kwargs["position_embeddings"])
        if rows.restarted is not None:
            anew = self.rotate(alive, rows.new_positions)
            embeddings = _restart(embeddings, anew, rows.restarted)
        kwargs = {**kwargs, "attention_mask": rows.mask, "position_embeddings": embeddings}
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = rows.take(kwargs["position_ids"], -1)
        if args:
            return (alive, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": alive}

    def after_layer(self, index: int, output: Any) -> Any:
        """Put the rows back among the others, and let the policy remove more of them."""
        if self.rows is None or (self.rows.index is None and index not in self.shortening):
            return None
        alive = output if isinstance(output, Tensor) else output[0]
        rows, full = self.rows, self.hidden_states
        if index in self.attended:
            alive = self._shorten(index, alive)
        if full is not None:
            alive = rows.put(full, alive)
        return alive if isinstance(output, Tensor) else (alive, *output[1:])

    @torch.no_grad()
    def _shorten(self, index: int, alive: Tensor) -> Tensor:
        assert isinstance(self.policy, LayerPolicy)
        assert self.rows is not None
        query, key, scaling = self.attended.pop(index)
        shortening = self.policy.shorten(
            alive,
            query,
            key,
            self.prompts[index][0],
            stage=self.shortening.index(index),
            scores=self.scores[index],
            sm_scale=scaling,
        )
        if shortening is None:
            return alive
        self.rows = self.rows.keep(shortening)
        self.prompt = None
        return alive if shortening.hidden_states is None else shortening.hidden_states

    # Behind the last layer

    @torch.no_grad()
    def finish(self) -> EvictionReport | None:
        """Evict."""
        if self.evicts:
            return self._evict_prompt()
        if self.num_new > 1:
            self._note_turn()
        decoding = self._decoding_layers()
        if decoding:
            blocks = [layer.store.slots for layer in decoding]
            evict_layers(blocks, self.policy.evict_step(blocks))
            for layer in decoding:
                layer.show()
        return None

    def _note_turn(self) -> None:
        """Remember what a later turn holds, though it is not evicted now."""
        for layer in self.cache.layers:
            if isinstance(layer, EvictedLayer):
                store = layer.store
                like = store.buckets[0].keys.new_empty(store.batch_size, 0)
                store.note_turn(self.modality_of(like, self.num_new, store.seen_len), self.mask)

    def _evict_prompt(self) -> EvictionReport:
        indices = sorted(self.prompts)
        if not indices:
            raise ValueError("kvevict.evict: the model has no full-attention layer to evict")
        scores = [self.scores[i] for i in indices]
        blocks = [self._block(i) for i in indices]
        bytes_before = _bytes_of(blocks)
        selections = None
        if isinstance(self.policy, PrefillPolicy):
            selections = select_layers(self.policy, scores)
        if selections is not None:
            scores, selections = self._merge(blocks, scores, selections)
        if selections is not None and _lists_per_head(self.cache):
            selections = tuple(_unfold(s, blocks[0].keys.shape[1]) for s in selections)
        if self.decodes:
            for block, layer in zip(blocks, scores, strict=True):
                block.track(layer.scores.view(block.keys.shape[0], -1, block.stored))
        before = [LayerSlots.of(block) for block in blocks]
        stores, bytes_new = before, 0
        if self._drops_channels(indices, blocks):
            stores, bytes_new = self._pack(indices, blocks, selections)
        elif selections is not None:
            stores = select_slots(blocks, selections, split=not self.decodes)
            bytes_new = sum(
                _bytes_of(store.buckets)
                for store, selection in zip(stores, selections, strict=True)
                if not selection.keeps_all
            )
        if self.decodes:
            begin_decoding(self.policy, [store.slots for store in stores], scores)
        is_shorter = any(rows.index is not None for rows in self.layer_rows.values())
        if stores is not before or self.every_turn or self.decodes or is_shorter:
            for i, store in zip(indices, stores, strict=True):
                self.cache.layers[i] = self._evicted_layer(i, store)
        return EvictionReport(
            kept=tuple(kept_of(i, store) for i, store in zip(indices, stores, strict=True)),
            modality=modality_by_column(before),
            bytes_before=bytes_before,
            bytes_after=sum(_bytes_of(store.blocks) for store in stores),
            bytes_peak=bytes_before + bytes_new,
        )

    def _merge(
        self, blocks: Sequence[Slots], scores: list[LayerScores], selections: tuple[Selection, ...]
    ) -> tuple[list[LayerScores], tuple[Selection, ...]]:
        """Let the policy merge, in the shape in which it saw the keys."""
        keys, values = [block.keys for block in blocks], [block.values for block in blocks]
        if _lists_per_head(self.cache):
            # Views: heads follow each other as sequences do.
            keys = [key.view(-1, 1, *key.shape[2:]) for key in keys]
            values = [value.view(-1, 1, *value.shape[2:]) for value in values]
        return merge_layers(self.policy, keys, values, scores, selections)

    def _drops_channels(self, indices: Sequence[int], blocks: Sequence[Slots]) -> bool:
        return any(
            i in self.channels and self.channels[i].shape[-1] < block.keys.shape[-1]
            for i, block in zip(indices, blocks, strict=True)
        )

    def _pack(
        self,
        indices: Sequence[int],
        blocks: Sequence[Slots],
        selections: Sequence[Selection] | None,
    ) -> tuple[list[LayerSlots], int]:
        """Take channels out of the older keys; also return the most bytes that took."""
        assert isinstance(self.policy, ChannelPolicy)
        if selections is None:
            selections = [_all_of(self.prompts[i][0]) for i in indices]
        stores: list[LayerSlots] = []
        whole = 0
        for i, block, selection in zip(indices, blocks, selections, strict=True):
            channels = self.channels[i]
            store = pack_slots(block, selection, channels, num_recent=self.policy.num_recent)
            narrow = count_bytes(older.keys for older in store.older.blocks)
            whole = max(whole, narrow * block.keys.shape[-1] // max(channels.shape[-1], 1))
            stores.append(store)
        return stores, whole + sum(_bytes_of(store.blocks) for store in stores)

    def _block(self, index: int) -> Slots:
        """Return what a layer stores before the eviction."""
        if index in self.blocks:
            return self.blocks[index]
        rows = self.layer_rows[index]
        assert self.modality is not None
        return _block_of(self.cache.layers[index], rows, self.modality)

    def _evicted_layer(self, index: int, store: LayerSlots) -> EvictedLayer:
        layer = EvictedLayer(store)
        layer.decode_policy = self.policy if self.decodes else None
        old = self.cache.layers[index]
        if isinstance(old, EvictedLayer):
            layer.position_shift, layer.restarted = old.position_shift, old.restarted
        rows = self.layer_rows.get(index)
        if rows is not None and rows.restart_decoding:
            layer.position_shift, layer.restarted = rows.num_removed, rows.restarted
        return layer


def _block_of(layer: Any, rows: Rows, modality: Tensor) -> Slots:
    """Return the keys of an ordinary layer with what they are."""
    modality = modality.gather(1, rows.columns)
    return Slots(
        layer.keys,
        layer.values,
        torch.cat([rows.tags, modality[:, None, :, None].int()], -1),
        seen_len=rows.num_columns,
        padding_lens=rows.padding_lens,
        has_empty=rows.mask is not None,
    )


def _all_of(prompt: Prompt) -> Selection:
    """Return the real keys of a prompt, padding left out."""
    lens = prompt.lens[:, None].int()
    return Selection(
        prompt.rows_of(prompt.valid)[:, None], lens, ragged=prompt.key_mask is not None
    )


def _lists_per_head(cache: Any) -> bool:
    return any(isinstance(x, EvictedLayer) and x.store.num_lists > 1 for x in cache.layers)


def _unfold(selection: Selection, num_kv_heads: int) -> Selection:
    """Turn lists of [batch_size * num_kv_heads, 1] sequences into lists per head."""
    shape, k = (-1, num_kv_heads), selection.kept_indices.shape[-1]
    return Selection(
        selection.kept_indices.view(*shape, k),
        selection.kept_lens.view(shape),
        keeps_all=selection.keeps_all,
        ragged=selection.ragged,
        key_weight=None if selection.key_weight is None else selection.key_weight.view(*shape, k),
    )


def _restart(old: Any, new: Any, restarted: Tensor | None) -> tuple[Tensor, ...]:
    """Return the new position embeddings of some sequences, the old ones of the others."""
    assert restarted is not None
    return tuple(n.where(restarted[:, None, None], o) for o, n in zip(old, new, strict=True))


def _shifted_positions(layer: EvictedLayer, new: Tensor, mask: Tensor | None) -> Tensor:
    """Return where new rows [batch_size, num_new, hidden] stand, if the prompt was renumbered."""
    assert layer.position_shift is not None
    if mask is None:
        rank = torch.arange(new.shape[1], device=new.device)[None]
    else:
        rank = (mask[:, mask.shape[1] - new.shape[1] :].cumsum(1) - 1).clamp(min=0)
    return (layer.store.slots.totals - layer.position_shift)[:, None] + rank


def _bytes_of(blocks: Any) -> int:
    return count_bytes(t for block in blocks for t in (block.keys, block.values))


def _check_full_attention(
    module: Any, layer: Any, query: Tensor, key: Tensor, mask: Tensor | None
) -> None:
    """Refuse attention that is not plain, causal self-attention."""
    name = type(module).__name__
    if not isinstance(layer, DynamicLayer) or not getattr(module, "is_causal", True):
        raise ValueError(f"kvevict.evict: {name} is not causal self-attention with a cache")
    is_split = isinstance(layer, EvictedLayer) and layer.keys is None
    if not is_split and (layer.keys is None or key.shape != layer.keys.shape):
        raise ValueError(
            f"kvevict.evict: {name} does not attend to the keys of its cache layer as they are "
            "(cross attention, shared or compressed caches)"
        )
    if mask is None:
        return
    expected = (query.shape[0], layer.get_seq_length())
    if mask.dim() != 2:
        raise ValueError(
            f"kvevict.evict: {name} needs a mask that is more than causal and padding (custom "
            "4-D mask, or images that attend in both directions)"
        )
    if tuple(mask.shape) != expected:
        raise ValueError(
            "kvevict.evict: attention_mask must cover the whole conversation, shape "
            f"{expected}, got {tuple(mask.shape)}"
        )
