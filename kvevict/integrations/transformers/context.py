"""The context around a model: `with evict(model, policy): ...`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import ModuleList
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvevict.integrations.transformers.layer import EvictedLayer
from kvevict.integrations.transformers.modality import find_modality
from kvevict.integrations.transformers.reports import EvictionReport, KeptLayer
from kvevict.integrations.transformers.step import Step
from kvevict.policies.base import PrefillPolicy
from kvevict.policies.between import LayerPolicy
from kvevict.policies.channels import ChannelPolicy
from kvevict.policies.decode import DecodePolicy

ATTENTION_NAME = "kvevict"
"""The name under which attention and mask functions are registered with transformers."""

Policy = PrefillPolicy | ChannelPolicy | LayerPolicy | DecodePolicy
"""What `evict` takes: an object with the methods of one or more of these protocols."""


def evict(
    model: PreTrainedModel,
    policy: Policy,
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

    A `ChannelPolicy` also drops channels of the older keys, for good: such a cache is not evicted
    again, neither in a later turn nor while decoding.

    A `DecodePolicy` that evicts while decoding does so after every later forward. A `LayerPolicy`
    removes rows from the first prompt between its layers; the output has all rows, those that were
    removed as they were then.

    An evicted cache is continued inside a context (this or a new one); outside it raises, since the
    layers differ in length. Steps in a context of another policy only append. Beam search,
    `copy.deepcopy` and cropping tokens that came later work, but for cropping while tokens are
    evicted in decoding; assisted generation is refused, as it feeds its first draft together with
    the prompt.

    A model is in at most one open context, and used by one thread at a time within it; models that
    share a config object count as one, as transformers chooses attention by the config. Contexts
    of different models do not disturb each other.

    Args:
        model: a causal language model or vision-language model, or its base model.
        policy: an object with the methods of `PrefillPolicy`, `ChannelPolicy`, `LayerPolicy` or
            `DecodePolicy`, or several of them, e.g. any of `kvevict.policies`.
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
            layers are evicted and count in the budget; policies between layers refuse such models.

    Example:
        >>> with kvevict.evict(model, TGVKV(keep=0.05)) as eviction:
        ...     model.generate(**inputs, max_new_tokens=64)
        >>> eviction.report.bytes_after / eviction.report.bytes_before
    """
    return Eviction(model, policy, every_turn=every_turn, modality=modality)


class Eviction:
    """The context that `evict` returns.

    Attributes:
        reports: one `EvictionReport` per eviction so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        every_turn: bool = False,
        modality: Tensor | None = None,
    ) -> None:
        if not isinstance(policy, (PrefillPolicy, ChannelPolicy, LayerPolicy, DecodePolicy)):
            raise ValueError(
                "kvevict.evict: policy must have the methods of PrefillPolicy, ChannelPolicy, "
                f"LayerPolicy or DecodePolicy of kvevict.policies, got {policy!r}"
            )
        if isinstance(policy, ChannelPolicy):
            _check_once(policy, every_turn)
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
        self._shortening: tuple[int, ...] = ()
        self._step: Step | None = None

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
        if isinstance(self.policy, LayerPolicy):
            self._add_layer_hooks(decoder, self.policy)
        hooks = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        for module in {id(m): m for m in (self.model, self.model.base_model)}.values():
            hooks.append(module.register_forward_pre_hook(self._note_inputs, with_kwargs=True))
        for hook in hooks:
            self._undo.callback(hook.remove)

    def _add_layer_hooks(self, decoder: Any, policy: LayerPolicy) -> None:
        layers = getattr(decoder, "layers", None)
        name = type(self.model).__name__
        if not isinstance(layers, ModuleList) or not hasattr(decoder, "rotary_emb"):
            raise ValueError(
                f"kvevict.evict: {type(policy).__name__} acts between layers, and the text decoder "
                f"of {name} is not a plain list of layers with rotary positions"
            )
        self._shortening = tuple(policy.shortening_layers(len(layers)))
        for i, layer in enumerate(layers) if self._shortening else ():
            before, after = partial(self._before_layer, i), partial(self._after_layer, i)
            self._undo.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.callback(layer.register_forward_hook(after).remove)

    def _close(self) -> None:
        del _OPEN[id(self._text_config)]

    def _restore(self) -> None:
        """Undo everything, the last change first, whatever one of the steps raises."""
        if self._step is not None:  # a forward was interrupted
            self._step.detach()
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
        self._step = Step(
            self.policy,
            cache,
            inputs.shape[1],
            every_turn=self.every_turn,
            shortening=self._shortening,
            modality_of=self._modality,
            rotate=partial(_rotary, module, self._text_config),
        )
        return args, kwargs

    def _after_decoder(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Evict; `output` is None where the forward raised."""
        step, self._step = self._step, None
        if step is None:
            return
        step.detach()
        report = None if output is None else step.finish()
        if report is not None:
            self.reports.append(report)
        self._inputs = {}

    def _before_layer(
        self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if self._step is None else self._step.before_layer(index, args, kwargs)

    def _after_layer(self, index: int, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return None if self._step is None else self._step.after_layer(index, output)

    def _modality(self, like: Tensor, num_columns: int, seen_len: int) -> Tensor:
        """Return the modality of the last columns of the conversation."""
        return find_modality(
            self.model.config, self._inputs, self.modality, like, num_columns, seen_len
        )

    def attend(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Be transformers' attention function inside the context; see `Step.attend`."""
        if self._step is None:
            raise RuntimeError(
                "kvevict: attention was called outside of the forward of the model that is inside "
                "`evict` (by a model that shares its config?)"
            )
        return self._step.attend(module, *args, **kwargs), None


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


def _rotary(decoder: Any, config: Any, hidden_states: Tensor, positions: Tensor) -> Any:
    """Return the position embeddings of rows that are numbered one by one [batch_size, qo_len]."""
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        positions = positions.expand(3, -1, -1)
    return decoder.rotary_emb(hidden_states, positions)


def _check_once(policy: ChannelPolicy, every_turn: bool) -> None:
    """Refuse to evict again what lacks channels: it cannot be scored."""
    decodes = isinstance(policy, DecodePolicy) and policy.evicts_while_decoding
    if every_turn or decodes:
        raise ValueError(
            f"kvevict.evict: {type(policy).__name__} drops channels of the keys, and cannot be "
            f"combined with {'every_turn=True' if every_turn else 'eviction while decoding'}"
        )


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
