"""Which columns of a conversation are text, which images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvevict.policies.base import AUDIO, IMAGE, VIDEO


def find_modality(
    config: Any,
    inputs: Mapping[str, Any],
    own: Tensor | None,
    like: Tensor,
    num_columns: int,
    seen_len: int,
) -> Tensor:
    """Return the modality of the last columns of the conversation.

    Args:
        config: of the model.
        inputs: of the model's forward: `input_ids`, `mm_token_type_ids`.
        own: what the user gave, [batch_size, prompt_len].
        like: [batch_size, ...], any tensor on the device that the result is wanted on.
        num_columns: how many columns are asked for.
        seen_len: columns of the conversation so far.

    Returns:
        [batch_size, num_columns] int8.

    Raises:
        ValueError: if the inputs do not tell, e.g. embeddings only, or a cache of which the first
            part was filled before the context.
    """
    shape = (like.shape[0], num_columns)
    if own is not None and own.shape[1] in (num_columns, seen_len):
        own = own[:, own.shape[1] - num_columns :]
        return _repeat_batch(own, shape).to(like.device, torch.int8)
    types = inputs.get("mm_token_type_ids")
    if types is not None and tuple(types.shape) == shape:
        found: Tensor = types.to(like.device, torch.int8)
        return found
    if config.get_text_config() is config:
        return torch.zeros(shape, dtype=torch.int8, device=like.device)
    input_ids = inputs.get("input_ids")
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
    return found.to(like.device)


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
