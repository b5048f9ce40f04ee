"""Evict the KV cache of Hugging Face models: `with kvevict.evict(model, policy): ...`.

How it works. Inside the context the text decoder uses an attention function of ours, registered
with transformers next to "sdpa" and "eager"; the vision tower keeps its own. It calls the same
SDPA kernels, and while the prompt passes through it lets the policy score each layer. A hook
behind the last layer then selects, and copies what stays into tensors of exactly that size: the
full-size storages are freed. Each layer of the cache becomes an `EvictedLayer`, which knows the
true length of the conversation, so positions (M-RoPE too) stay what they would be without eviction.

Attention never needs a mask of prompt x prompt: a left-padded batch is computed row by row on the
real tokens, a later turn in blocks of `QUERY_BLOCK` rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvevict.policies.base import (
    AUDIO,
    IMAGE,
    VIDEO,
    LayerScores,
    PrefillPolicy,
    Prompt,
    Selection,
    compact_layers,
    select_layers,
)

ATTENTION_NAME = "kvevict"
"""The name under which attention and mask functions are registered with transformers."""

QUERY_BLOCK = 256
"""Query rows per attention call where a mask is needed; the mask is QUERY_BLOCK x kv_len."""


def evict(
    model: PreTrainedModel,
    policy: PrefillPolicy,
    *,
    every_turn: bool = False,
    modality: Tensor | None = None,
) -> Eviction:
    """Evict the KV cache of a model while the returned context is open.

    The cache is evicted after the first forward of more than one token on an empty cache: the
    prompt of `generate`, or a plain `model(...)` call. Decoding and later turns attend to what was
    kept and append to it. A later turn on the same cache may pass the whole conversation, as
    `generate` expects, or only its new tokens, with the attention mask of the whole conversation
    if there is one. A prompt fed in chunks is evicted after its first chunk, so pass it whole.

    An evicted cache is continued inside a context (this or a new one with any policy); outside it
    raises, since the layers differ in length. Within it beam search, `copy.deepcopy` and cropping
    tokens that came later work; assisted generation is refused, as it feeds its first draft
    together with the prompt.

    A model is in at most one open context, and used by one thread at a time within it; models that
    share a config object count as one, as transformers chooses attention by the config. Contexts
    of different models do not disturb each other.

    Args:
        model: a causal language model or vision-language model, or its base model.
        policy: a `kvevict.policies` policy.
        every_turn: evict again after every later forward of more than one token; `keep` then
            refers to the whole conversation.
        modality: [batch_size, prompt_len], bool (True = image) or the codes of
            `kvevict.policies.Prompt`, padding columns included; in a context opened for a later
            turn it covers the whole conversation. It overrules what is found in the inputs:
            `mm_token_type_ids`, else `input_ids` compared with the placeholder ids of the config
            (`image_token_id`, `image_token_index`, `video_token_id`, ...).

    Returns:
        The context manager; after the prompt, `.report` says what was kept.

    Raises:
        ValueError: on entering, if the model cannot be supported (no SDPA attention, encoder-
            decoder), or it or one that shares its config is in an open context; inside, for
            `use_cache=False`, static, quantized, offloaded and other caches that are not dynamic,
            custom 4-D masks, bidirectional or cross attention in the text layers, or inputs whose
            modality cannot be told. It never runs with the full cache instead. Sliding-window and
            linear-attention layers of a hybrid stack are left as they are; only the full-attention
            layers are evicted and count in the budget.

    Example:
        >>> with kvevict.evict(model, TGVKV(keep=0.05)) as eviction:
        ...     model.generate(**inputs, max_new_tokens=64)
        >>> eviction.report.bytes_after / eviction.report.bytes_before
    """
    return Eviction(model, policy, every_turn=every_turn, modality=modality)


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """What stayed in one layer.

    Attributes:
        layer_idx: the layer's index in the model and in the cache.
        kept_indices: [batch_size, 1 | num_kv_heads, k] int32, columns of the (padded)
            conversation, ascending, -1 beyond kept_lens; one list for all heads or one per KV head.
        kept_lens: [batch_size, 1 | num_kv_heads] int32.
    """

    layer_idx: int
    kept_indices: Tensor
    kept_lens: Tensor


@dataclass(frozen=True, eq=False)
class EvictionReport:
    """What one eviction did.

    Attributes:
        kept: the layers that were considered, i.e. those with full attention.
        modality: [batch_size, seen_len] int8, the codes of `kvevict.policies.Prompt`, -1 where a
            column is padding or was evicted by an earlier turn.
        bytes_before: bytes of the keys and values of these layers before.
        bytes_after: the same after.
        bytes_peak: the most held at once, old and new tensors together.
    """

    kept: tuple[KeptLayer, ...]
    modality: Tensor
    bytes_before: int
    bytes_after: int
    bytes_peak: int


class EvictedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer of which a part was evicted.

    It stores fewer slots than the conversation has tokens. `get_seq_length` tells the length of the
    conversation, so that positions, and the slicing of inputs in `generate`, stay right.

    Attributes:
        slots: [batch_size, 1 | num_kv_heads, num_known] int32, the column of the conversation in
            each of the first slots, -1 = empty. Later slots follow one by one.
        modality: like slots, int8; slots that follow hold text.
        num_kept: the first slots, those left by the last eviction.
        num_evicted: columns of the conversation minus slots.
        has_empty: some slot is -1 (read by the host, hence kept).
        attached: inside a forward of a model under `evict`.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, slots: Tensor, modality: Tensor, *, seen_len: int
    ) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.is_initialized = True
        self.slots = slots
        self.modality = modality
        self.num_kept = keys.shape[-2]
        self.num_evicted = seen_len - keys.shape[-2]
        self.has_empty = False
        self.attached = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; refused outside of `evict`, where nobody would mask this layer rightly."""
        if not self.attached:
            raise RuntimeError(
                "kvevict: this cache was evicted; continue it inside `with kvevict.evict(...)`"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the length of the conversation, evicted tokens included."""
        stored = int(super().get_seq_length())
        return stored + self.num_evicted if stored else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as far as they came after the eviction."""
        if self.is_initialized:
            later = self.keys.shape[-2] - self.num_kept
            if abs(tokens_to_remove) > later:
                raise ValueError(
                    f"kvevict: only the {later} tokens that came after the eviction can be taken "
                    f"back, got {abs(tokens_to_remove)} (assisted generation feeds its first "
                    "draft together with the prompt, and is not supported)"
                )
        super().crop(tokens_to_remove)
        if self.is_initialized:
            stored = self.keys.shape[-2]
            self.slots, self.modality = self.slots[..., :stored], self.modality[..., :stored]

    def reset(self) -> None:
        """Forget everything; the next forward starts with an ordinary layer."""
        # Older versions of transformers only zero the tensors, and keep their length.
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences, for beam search."""
        super().reorder_cache(beam_idx)
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        super().batch_select_indices(indices)
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slots, self.modality = change(self.slots), change(self.modality)

    def describe(self) -> tuple[Tensor, Tensor]:
        """Return column and modality of every slot [batch_size, 1 | num_kv_heads, stored]."""
        known = self.slots.shape[-1]
        tail = torch.arange(known, self.keys.shape[-2], device=self.slots.device)
        tail = (tail + self.num_evicted).to(self.slots.dtype).expand(*self.slots.shape[:-1], -1)
        slots = torch.cat([self.slots, tail], -1)
        modality = torch.cat([self.modality, torch.zeros_like(tail, dtype=torch.int8)], -1)
        return slots, modality

    def append_turn(self, modality: Tensor, mask: Tensor | None) -> None:
        """Note what the last tokens are.

        Args:
            modality: [batch_size, num_new] int8 of the newest slots.
            mask: [batch_size, seen_len] bool of the conversation, None = no padding.
        """
        self.slots, self.modality = self.describe()
        num_new = modality.shape[1]
        self.modality[..., self.modality.shape[-1] - num_new :] = modality[:, None]
        if mask is not None:
            real = mask.gather(1, self.slots.clamp(min=0).flatten(1).long()).view_as(self.slots)
            self.slots = self.slots.where(real, -1)
            self.has_empty = True

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Return which slots may be attended [batch_size, 1 | num_kv_heads, stored], None = all.

        Args:
            mask: [batch_size, seen_len] bool of the conversation, None = no padding.
        """
        if mask is None and not self.has_empty:
            return None
        known = self.slots >= 0
        num_later = self.keys.shape[-2] - known.shape[-1]
        if mask is None:
            later = known.new_ones(known.shape[0], num_later)
        else:
            later = mask[:, mask.shape[1] - num_later :]
        return torch.cat([known, later[:, None].expand(-1, known.shape[1], -1)], -1)


@dataclass(eq=False)
class _Step:
    """One forward through the decoder."""

    cache: Any
    num_new: int
    evicts: bool
    mask: Tensor | None = None
    prompts: dict[int, tuple[Prompt, Tensor | None]] = field(default_factory=dict)
    known: dict[int, EvictedLayer] = field(default_factory=dict)
    scores: dict[int, LayerScores] = field(default_factory=dict)
    spans: list[tuple[int, int]] | None = None
    spans_known: bool = False


class Eviction:
    """The context that `evict` returns.

    Attributes:
        reports: one `EvictionReport` per eviction so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: PrefillPolicy,
        *,
        every_turn: bool = False,
        modality: Tensor | None = None,
    ) -> None:
        if not isinstance(policy, PrefillPolicy):
            raise ValueError(
                f"kvevict.evict: policy must have the methods of kvevict.policies.PrefillPolicy, "
                f"got {policy!r}"
            )
        if modality is not None and modality.dim() != 2:
            raise ValueError(
                "kvevict.evict: modality must have shape (batch_size, prompt_len), "
                f"got {tuple(modality.shape)}"
            )
        self.model = model
        self.policy = policy
        self.every_turn = every_turn
        self.modality = modality
        self.reports: list[EvictionReport] = []
        self._text_config = model.config.get_text_config(decoder=True)
        self._undo = ExitStack()
        self._inputs: dict[str, Any] = {}
        self._step: _Step | None = None

    @property
    def report(self) -> EvictionReport | None:
        """The last eviction, None before the first."""
        return self.reports[-1] if self.reports else None

    @property
    def kept(self) -> tuple[KeptLayer, ...]:
        """What the last eviction kept, per layer; empty before the first."""
        return self.reports[-1].kept if self.reports else ()

    def __enter__(self) -> Eviction:
        decoder = self._check_model()
        try:
            self._switch_attention()
            self._add_hooks(decoder)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    # Entering

    def _check_model(self) -> Any:
        model, name = self.model, type(self.model).__name__
        opened = _OPEN.get(id(self._text_config))
        if opened is not None and opened.model.get_decoder() is not model.get_decoder():
            raise ValueError(
                f"kvevict.evict: {name} shares its config with a model inside an open `evict` "
                "context; give each model a config of its own (copy.deepcopy)"
            )
        if self._text_config._attn_implementation == ATTENTION_NAME:
            raise ValueError(f"kvevict.evict: {name} is already inside an open `evict` context")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"kvevict.evict: {name} is an encoder-decoder model")
        decoder = model.get_decoder()
        if (
            not getattr(decoder, "_supports_sdpa", False)
            or not decoder._can_set_attn_implementation()
        ):
            raise ValueError(f"kvevict.evict: the text decoder of {name} has no SDPA attention")
        return decoder

    def _switch_attention(self) -> None:
        """Let the text decoder, and nothing else, use our attention function."""
        config, previous = self.model.config, self._text_config._attn_implementation
        key = next((k for k in config.sub_configs if getattr(config, k) is self._text_config), None)

        def switch(implementation: str) -> None:
            self.model.set_attn_implementation(
                implementation if key is None else {key: implementation}
            )

        if key is None and self._text_config is not config:
            raise ValueError(
                f"kvevict.evict: the text config of {type(self.model).__name__} is nested too deep"
            )
        # By identity: configs compare by value.
        _OPEN[id(self._text_config)] = self
        self._undo.callback(self._close)
        self._undo.callback(switch, previous)
        switch(ATTENTION_NAME)

    def _add_hooks(self, decoder: Any) -> None:
        hooks = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        for module in {id(m): m for m in (self.model, self.model.base_model)}.values():
            hooks.append(module.register_forward_pre_hook(self._note_inputs, with_kwargs=True))
        for hook in hooks:
            self._undo.callback(hook.remove)

    def _close(self) -> None:
        del _OPEN[id(self._text_config)]

    def _restore(self) -> None:
        """Undo everything, the last change first, whatever one of the steps raises."""
        if self._step is not None:  # a forward was interrupted
            for layer in self._step.cache.layers:
                if isinstance(layer, EvictedLayer):
                    layer.attached = False
        self._inputs, self._step = {}, None
        self._undo.close()

    # Hooks

    def _note_inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what tells text from images; the decoder itself only sees embeddings."""
        given = _bind(module, args, kwargs)
        if module is self.model:
            self._inputs = {}
        for name in ("input_ids", "mm_token_type_ids"):
            if isinstance(given.get(name), Tensor):
                self._inputs[name] = given[name]

    def _before_decoder(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._step = None
        given = _bind(module, args, kwargs)
        cache = given.get("past_key_values")
        if cache is None:
            use_cache = given.get("use_cache")
            if not (self._text_config.use_cache if use_cache is None else use_cache):
                raise ValueError("kvevict.evict: there is no cache to evict with use_cache=False")
            cache = DynamicCache(config=self._text_config)
            kwargs = {**kwargs, "past_key_values": cache, "use_cache": True}
        _check_cache(cache)
        inputs = given.get("inputs_embeds")
        inputs = given["input_ids"] if inputs is None else inputs
        num_new = inputs.shape[1]
        is_first = cache.get_seq_length() == 0
        self._step = _Step(cache, num_new, evicts=num_new > 1 and (is_first or self.every_turn))
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, EvictedLayer):
                layer.attached = True
                if is_first:  # The cache was reset.
                    cache.layers[i] = DynamicLayer()
        return args, kwargs

    def _after_decoder(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Evict; `output` is None where the forward raised."""
        step, self._step = self._step, None
        if step is None:
            return
        for layer in step.cache.layers:
            if isinstance(layer, EvictedLayer):
                layer.attached = False
        if output is not None and step.evicts:
            self._evict(step)
        elif output is not None and step.num_new > 1:
            self._note_turn(step)
        self._inputs = {}

    # Attention

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend, and score the layer if it is about to be evicted.

        Args:
            module: the attention module.
            query: [batch_size, num_qo_heads, qo_len, head_dim].
            key: [batch_size, num_kv_heads, kv_len, head_dim].
            value: like key.
            mask: [batch_size, seen_len] bool, or what SDPA wants in a sliding-window layer.
            **kwargs: handed to SDPA.

        Returns:
            [batch_size, qo_len, num_qo_heads, head_dim], and None for the weights.
        """
        step = self._step
        if step is None:
            raise RuntimeError(
                "kvevict: attention was called outside of the forward of the model that is inside "
                "`evict` (by a model that shares its config?)"
            )
        layer_idx = module.layer_idx
        layer = step.cache.layers[layer_idx] if layer_idx < len(step.cache.layers) else None

        def sdpa(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
            return sdpa_attention_forward(module, q, k, v, m, **kwargs)[0]  # type: ignore[no-any-return]

        if isinstance(layer, DynamicSlidingWindowLayer):
            return sdpa(query, key, value, mask), None
        _check_full_attention(module, layer, query, key, mask)
        step.mask = mask
        if step.evicts:
            self._score(step, layer_idx, layer, query, key, value, kwargs.get("scaling"))
        if key.shape[2] == query.shape[2]:
            return _attend_prompt(sdpa, query, key, value, _spans(step, mask)), None
        visible = layer.visible(mask) if isinstance(layer, EvictedLayer) else _add_heads(mask)
        if visible is not None and visible.shape[1] > 1:
            visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
        return _attend_blocks(sdpa, query, key, value, visible), None

    def _score(
        self,
        step: _Step,
        layer_idx: int,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
    ) -> None:
        per_head = _lists_per_head(step.cache)
        if step.prompts and key.device != next(iter(step.prompts.values()))[0].modality.device:
            raise ValueError("kvevict.evict: a model spread over several devices is not supported")
        prompt, row_index = self._prompt(step, layer_idx, layer, key, per_head)
        if per_head:
            # Lists of an earlier turn differ between the KV heads: each is a sequence of its own.
            batch_size, num_kv_heads = key.shape[:2]
            query = query.reshape(batch_size * num_kv_heads, -1, *query.shape[2:])
            key, value = key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]
        step.scores[layer_idx] = self.policy.observe(
            query, key, value, prompt, row_index, sm_scale=scaling
        )

    def _prompt(
        self, step: _Step, layer_idx: int, layer: Any, key: Tensor, per_head: bool
    ) -> tuple[Prompt, Tensor | None]:
        """Return what the keys of this layer are, and the rows to observe."""
        is_fresh = key.shape[2] == step.num_new
        if is_fresh and step.prompts:
            step.prompts[layer_idx] = next(iter(step.prompts.values()))
            return step.prompts[layer_idx]
        if is_fresh:
            prompt = Prompt(self._modality(key, step.num_new, step.num_new), step.mask)
        else:
            prompt = self._later_prompt(step, layer_idx, layer, key, per_head)
        step.prompts[layer_idx] = prompt, self.policy.row_index(prompt)
        return step.prompts[layer_idx]

    def _later_prompt(
        self, step: _Step, layer_idx: int, layer: Any, key: Tensor, per_head: bool
    ) -> Prompt:
        """Return what the kept and the new keys are, and remember it in `step.known`."""
        if isinstance(layer, EvictedLayer):
            new = self._modality(key, step.num_new, layer.get_seq_length())
            layer.append_turn(new, step.mask)
        else:
            stored = key.shape[2]
            layer = _describe(layer, self._modality(key, stored, stored), step.mask)
        step.known[layer_idx] = layer
        totals = torch.full((key.shape[0],), layer.get_seq_length(), device=key.device)
        if step.mask is not None:
            totals = step.mask.sum(1)
        num_lists = key.shape[1] if per_head else 1
        slots, modality = (
            t.expand(-1, num_lists, -1).flatten(0, 1) for t in (layer.slots, layer.modality)
        )
        return Prompt(
            modality,
            key_mask=slots >= 0,
            qo_len=step.num_new,
            total_lens=totals.repeat_interleave(num_lists),
        )

    # Modality

    def _modality(self, key: Tensor, num_columns: int, seen_len: int) -> Tensor:
        """Return the modality of the last columns of the conversation.

        Returns:
            [batch_size, num_columns] int8.

        Raises:
            ValueError: if the inputs do not tell, e.g. embeddings only, or a cache of which the
                first part was filled before the context.
        """
        shape = (key.shape[0], num_columns)
        if self.modality is not None and self.modality.shape[1] in (num_columns, seen_len):
            own = self.modality[:, self.modality.shape[1] - num_columns :]
            return _repeat_batch(own, shape).to(key.device, torch.int8)
        types = self._inputs.get("mm_token_type_ids")
        if types is not None and tuple(types.shape) == shape:
            found: Tensor = types.to(key.device, torch.int8)
            return found
        config = self.model.config
        if config.get_text_config() is config:
            return torch.zeros(shape, dtype=torch.int8, device=key.device)
        input_ids = self._inputs.get("input_ids")
        codes = _placeholder_codes(config)
        if input_ids is None or tuple(input_ids.shape) != shape or not codes:
            why = "the config names no placeholder id" if not codes else "no input_ids cover them"
            raise ValueError(
                f"kvevict.evict: cannot tell image tokens from text in {shape} tokens, {why}; "
                "pass modality="
            )
        found = torch.zeros(shape, dtype=torch.int8, device=input_ids.device)
        for token_id, code in codes:
            found = found.masked_fill(input_ids == token_id, code)
        return found.to(key.device)

    # Eviction

    def _evict(self, step: _Step) -> None:
        indices = sorted(step.scores)
        if not indices:
            raise ValueError("kvevict.evict: the model has no full-attention layer to evict")
        cache_layers = step.cache.layers
        old = []
        for i in indices:
            prompt, _ = step.prompts[i]
            old.append(
                step.known.get(i) or _describe(cache_layers[i], prompt.modality, prompt.key_mask)
            )
        keys, values = [layer.keys for layer in old], [layer.values for layer in old]
        bytes_before = _count_bytes(keys) + _count_bytes(values)
        bytes_new = 0
        kept = old
        selections = select_layers(self.policy, [step.scores[i] for i in indices])
        if selections is not None:
            if _lists_per_head(step.cache):
                selections = tuple(_unfold(s, keys[0].shape[1]) for s in selections)
            keys, values = compact_layers(keys, values, selections)
            kept = [_shrink(*parts) for parts in zip(old, keys, values, selections, strict=True)]
            bytes_new = sum(
                _count_bytes([key, value])
                for key, value, selection in zip(keys, values, selections, strict=True)
                if not selection.keeps_all
            )
        if selections is not None or self.every_turn:
            for i, layer in zip(indices, kept, strict=True):
                cache_layers[i] = layer
        self.reports.append(
            EvictionReport(
                kept=tuple(_kept(i, layer) for i, layer in zip(indices, kept, strict=True)),
                modality=_by_column(old),
                bytes_before=bytes_before,
                bytes_after=_count_bytes(keys) + _count_bytes(values),
                bytes_peak=bytes_before + bytes_new,
            )
        )

    def _note_turn(self, step: _Step) -> None:
        """Remember what a later turn holds, though it is not evicted now."""
        for layer in step.cache.layers:
            if isinstance(layer, EvictedLayer):
                seen_len = layer.get_seq_length()
                layer.append_turn(self._modality(layer.keys, step.num_new, seen_len), step.mask)


_OPEN: dict[int, Eviction] = {}
"""Open contexts by the identity of their text config."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Be transformers' attention function; see `Eviction.attend`."""
    eviction = _OPEN.get(id(module.config))
    if eviction is None:
        raise RuntimeError(f'kvevict: attention "{ATTENTION_NAME}" is used outside of `evict`')
    return eviction.attend(module, query, key, value, attention_mask, **kwargs)


def _mask(**kwargs: Any) -> Tensor | None:
    """Be transformers' mask function: hand the 2-D padding mask to every layer.

    A mask that is not plainly causal (sliding window, bidirectional images) is built as for SDPA.
    """
    if kwargs["mask_function"] is causal_mask_function:
        mask: Tensor | None = kwargs["attention_mask"]
    else:
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs)
    return mask


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)


def _bind(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _check_cache(cache: Any) -> None:
    """Refuse caches whose layers cannot simply be replaced by shorter ones."""
    if not isinstance(cache, Cache):
        raise ValueError(f"kvevict.evict: the cache must be a DynamicCache, got {cache!r}")
    if cache.offloading:
        raise ValueError("kvevict.evict: an offloaded cache is not supported")
    supported = (DynamicLayer, EvictedLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    layers: Iterable[type] = map(type, cache.layers)
    if cache.layer_class_to_replicate is not None:
        layers = (*layers, cache.layer_class_to_replicate)
    for kind in layers:
        if kind not in supported:
            raise ValueError(
                f"kvevict.evict: the cache must be a DynamicCache, got a layer of {kind.__name__}"
            )


def _check_full_attention(
    module: Any, layer: Any, query: Tensor, key: Tensor, mask: Tensor | None
) -> None:
    """Refuse attention that is not plain, causal self-attention."""
    name = type(module).__name__
    if not isinstance(layer, DynamicLayer) or not getattr(module, "is_causal", True):
        raise ValueError(f"kvevict.evict: {name} is not causal self-attention with a cache")
    if layer.keys is None or key.shape != layer.keys.shape:
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


_Sdpa = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _spans(step: _Step, mask: Tensor | None) -> list[tuple[int, int]] | None:
    """Return first and last + 1 real column of every sequence, None where all are real.

    One synchronization per forward, not per layer.
    """
    if not step.spans_known and mask is not None:
        column = torch.arange(mask.shape[1], device=mask.device)
        first = column.where(mask, mask.shape[1]).amin(1)
        stop = (column + 1).where(mask, 0).amax(1)
        spans = torch.stack([first, stop, mask.sum(1)], 1).tolist()
        if any(stop - first != count for first, stop, count in spans if count):
            raise ValueError("kvevict.evict: padding in the middle of a prompt is not supported")
        if any(count < mask.shape[1] for *_, count in spans):
            step.spans = [(min(first, stop), stop) for first, stop, _ in spans]
    step.spans_known = True
    return step.spans


def _attend_prompt(
    sdpa: _Sdpa, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]] | None
) -> Tensor:
    """Attend causally; with padding, sequence by sequence on the real columns."""
    if spans is None:
        return sdpa(query, key, value, None)
    batch_size, num_heads, qo_len, _ = query.shape
    output = value.new_zeros(batch_size, qo_len, num_heads, value.shape[-1])
    for b, (first, stop) in enumerate(spans):
        if stop > first:
            q, k, v = (t[b : b + 1, :, first:stop] for t in (query, key, value))
            output[b : b + 1, first:stop] = sdpa(q, k, v, None)
    return output


def _attend_blocks(
    sdpa: _Sdpa, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
) -> Tensor:
    """Attend to a cache that is longer than the new rows, in blocks of rows.

    Args:
        sdpa: attention of some rows with a mask.
        query: the new rows, the last of the conversation.
        key: cached and new keys.
        value: like key.
        visible: [batch_size, 1 | num_qo_heads, kv_len] bool, None = all.
    """
    qo_len, kv_len = query.shape[2], key.shape[2]
    if qo_len == 1:
        return sdpa(query, key, value, None if visible is None else visible[:, :, None])
    outputs = []
    for begin in range(0, qo_len, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, qo_len)
        stop = kv_len - qo_len + end
        row = torch.arange(kv_len - qo_len + begin, stop, device=key.device)
        mask = (torch.arange(stop, device=key.device) <= row[:, None])[None, None]
        if visible is not None:
            mask = mask & visible[:, :, None, :stop]
            # A padding row that sees nothing must not become NaN; nobody reads it.
            mask = mask | ~mask.any(-1, keepdim=True)
        outputs.append(sdpa(query[:, :, begin:end], key[:, :, :stop], value[:, :, :stop], mask))
    return torch.cat(outputs, 1)


def _add_heads(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None]


def _repeat_batch(modality: Tensor, shape: tuple[int, int]) -> Tensor:
    """Repeat a mask per sequence, as `generate` repeats the inputs for beams."""
    repeats, rest = divmod(shape[0], modality.shape[0])
    if rest:
        raise ValueError(
            f"kvevict.evict: modality must have shape {shape}, got {tuple(modality.shape)}"
        )
    return modality.repeat_interleave(repeats, 0)


def _placeholder_codes(config: Any) -> list[tuple[int, int]]:
    """Return the placeholder ids that the config names, each with its modality."""
    codes = []
    for prefix, code in (("audio", AUDIO), ("video", VIDEO), ("image", IMAGE)):
        for suffix in ("token_id", "token_index"):
            token_id = getattr(config, f"{prefix}_{suffix}", None)
            if token_id is not None:
                codes.append((int(token_id), code))
    return codes


def _lists_per_head(cache: Any) -> bool:
    return any(isinstance(x, EvictedLayer) and x.slots.shape[1] > 1 for x in cache.layers)


def _describe(layer: Any, modality: Tensor, mask: Tensor | None) -> EvictedLayer:
    """Return a layer that holds every column so far, with its bookkeeping."""
    batch_size, _, stored, _ = layer.keys.shape
    column = torch.arange(stored, dtype=torch.int32, device=layer.keys.device)
    slots = column.expand(batch_size, 1, -1)
    if mask is not None:
        slots = slots.where(mask[:, None], -1)
    described = EvictedLayer(
        layer.keys, layer.values, slots, modality[:, None].to(torch.int8), seen_len=stored
    )
    described.has_empty = mask is not None
    return described


def _shrink(old: EvictedLayer, key: Tensor, value: Tensor, selection: Selection) -> EvictedLayer:
    """Return the layer that holds the kept `key` and `value`, its slots looked up in the old."""
    index = selection.kept_indices.long()
    empty = index < 0
    slots, modality = (
        t.expand(-1, index.shape[1], -1).gather(-1, index.clamp(min=0))
        for t in (old.slots, old.modality)
    )
    new = EvictedLayer(
        key,
        value,
        slots.masked_fill(empty, -1),
        modality.masked_fill(empty, 0),
        seen_len=old.get_seq_length(),
    )
    new.has_empty = selection.ragged
    return new


def _unfold(selection: Selection, num_kv_heads: int) -> Selection:
    """Turn lists of [batch_size * num_kv_heads, 1] sequences into lists per head."""
    shape = (-1, num_kv_heads)
    return Selection(
        selection.kept_indices.view(*shape, selection.kept_indices.shape[-1]),
        selection.kept_lens.view(shape),
        keeps_all=selection.keeps_all,
        ragged=selection.ragged,
    )


def _kept(layer_idx: int, layer: EvictedLayer) -> KeptLayer:
    """Return the report of one layer: real slots in front, -1 behind."""
    slots, _ = layer.describe()
    last = torch.iinfo(slots.dtype).max
    ascending = slots.where(slots >= 0, last).sort(-1).values
    kept_lens = (slots >= 0).sum(-1, dtype=torch.int32)
    return KeptLayer(layer_idx, ascending.where(ascending < last, -1), kept_lens)


def _by_column(layers: list[EvictedLayer]) -> Tensor:
    """Return the modality of every column that some layer holds [batch_size, seen_len], else -1."""
    seen_len = layers[0].get_seq_length()
    found = layers[0].modality.new_full((layers[0].slots.shape[0], seen_len + 1), -1)
    for layer in layers:
        slots, modality = (t.flatten(1) for t in layer.describe())
        found.scatter_(1, slots.where(slots >= 0, seen_len).long(), modality)
    return found[:, :seen_len]


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
