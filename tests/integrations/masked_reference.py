"""Plain attention that keeps the whole cache and masks what should have been evicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvevict.integrations.transformers import KeptLayer

NAME = "kvevict_masked_reference"


class MaskedReference:
    """What a model must compute when columns are evicted after `prompt_len` rows.

    `kept` maps a layer to [batch_size, 1 | num_kv_heads, prompt_len] bool. Without it the
    reference is ordinary attention. It records the query, key and value of every forward of more
    than one row: `recorded[layer][turn]`, and of one row: `steps[layer][step]`.

    `faded` maps a layer to channels of its keys that are 0 for later rows, [batch_size,
    num_kv_heads, prompt_len, head_dim] bool.

    `live` maps a layer to what each forward of the newest row sees, one after the other:
    [batch_size, 1 | num_kv_heads, kv_len] bool. `hidden` maps a layer to columns that no row of it
    sees, [batch_size, 1, prompt_len] bool.

    `stored` maps a layer to what merging made of the prompt, for the rows after it: keys and values
    [batch_size, num_kv_heads, prompt_len, head_dim] and weights, their shape without head_dim.
    """

    def __init__(self, prompt_len: int, kept: dict[int, Tensor] | None = None) -> None:
        self.prompt_len = prompt_len
        self.kept = kept or {}
        self.faded: dict[int, Tensor] = {}
        self.live: dict[int, list[Tensor]] = {}
        self.hidden: dict[int, Tensor] = {}
        self.stored: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.steps: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.recorded: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend eagerly in float32."""
        records = self.recorded if query.shape[2] > 1 else self.steps
        records.setdefault(module.layer_idx, []).append((query, key, value))
        batch_size, num_qo_heads, qo_len, _ = query.shape
        kv_len, group_size = key.shape[2], num_qo_heads // key.shape[1]
        bias = torch.zeros(1)
        if module.layer_idx in self.stored and kv_len > self.prompt_len:
            keys, values, weights = self.stored[module.layer_idx]
            key = torch.cat([keys.to(key.dtype), key[:, :, self.prompt_len :]], 2)
            value = torch.cat([values.to(value.dtype), value[:, :, self.prompt_len :]], 2)
            new = weights.new_ones(*key.shape[:2], kv_len - self.prompt_len)
            bias = torch.cat([weights, new], 2).log().float().repeat_interleave(group_size, 1)
            bias = bias[:, :, None]
        row = torch.arange(kv_len - qo_len, kv_len)[:, None]
        visible = (torch.arange(kv_len) <= row).expand(batch_size, num_qo_heads, -1, -1).clone()
        if mask is not None:
            visible &= mask[:, None, None].bool()
        kept = self.kept.get(module.layer_idx)
        if kept is not None:
            per_head = kept.repeat_interleave(num_qo_heads // kept.shape[1], 1)[:, :, None]
            per_head = per_head.repeat_interleave(batch_size // per_head.shape[0], 0)
            prompt = visible[..., : self.prompt_len]
            prompt &= per_head | (row < self.prompt_len)
        if qo_len == 1 and module.layer_idx in self.live:
            alive = self.live[module.layer_idx].pop(0)
            visible &= alive.repeat_interleave(num_qo_heads // alive.shape[1], 1)[:, :, None]
        if module.layer_idx in self.hidden:
            visible[..., : self.prompt_len] &= ~self.hidden[module.layer_idx][:, :, None]
        visible |= ~visible.any(-1, keepdim=True)
        if module.layer_idx in self.faded and kv_len > self.prompt_len:
            faded = self.faded[module.layer_idx]
            faded = faded.repeat_interleave(batch_size // faded.shape[0], 0)
            prompt = key[:, :, : self.prompt_len].masked_fill(faded, 0)
            key = torch.cat([prompt, key[:, :, self.prompt_len :]], 2)
        logits = query.float() @ key.float().repeat_interleave(group_size, 1).mT * scaling + bias
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        output = weights @ value.float().repeat_interleave(group_size, 1)
        return output.transpose(1, 2).to(query.dtype).contiguous(), None


@contextmanager
def masked_reference(
    model: Any, prompt_len: int, kept: dict[int, Tensor] | None = None
) -> Iterator[MaskedReference]:
    """Run a model on the reference."""
    reference = MaskedReference(prompt_len, kept)
    ALL_ATTENTION_FUNCTIONS.register(NAME, reference.attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda **kwargs: kwargs["attention_mask"])
    multimodal = hasattr(model.config, "text_config")
    model.set_attn_implementation({"text_config": NAME} if multimodal else NAME)
    try:
        yield reference
    finally:
        model.set_attn_implementation({"text_config": "sdpa"} if multimodal else "sdpa")


def kept_mask(kept_indices: Tensor, prompt_len: int) -> Tensor:
    """Turn padded index lists [..., k] into masks [..., prompt_len]."""
    mask = torch.zeros(*kept_indices.shape[:-1], prompt_len + 1, dtype=torch.bool)
    mask.scatter_(-1, kept_indices.where(kept_indices >= 0, prompt_len).long(), True)
    return mask[..., :prompt_len]


def faded_mask(layer: KeptLayer, num_recent: int, prompt_len: int, head_dim: int) -> Tensor:
    """Return the channels that the older of the kept keys lack, as `MaskedReference.faded`."""
    assert layer.kept_channels is not None
    slot = torch.arange(layer.kept_indices.shape[-1])
    is_older = slot < layer.kept_lens[..., None] - num_recent
    older = kept_mask(layer.kept_indices.where(is_older, -1), prompt_len)
    stored = kept_mask(layer.kept_channels, head_dim)
    return older[..., None] & ~stored[:, :, None]
