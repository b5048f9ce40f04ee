"""A cache layer of which a part was evicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvevict.policies.decode import DecodePolicy
from kvevict.slots import LayerSlots


class EvictedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that stores fewer slots than the conversation has tokens.

    `get_seq_length` tells the length of the conversation, so that positions, and the slicing of
    inputs in `generate`, stay right.

    Attributes:
        keys: [batch_size, num_kv_heads, stored, head_dim], a view of the first slots; None where
            it is not one block, see `store.blocks`.
        values: like keys.
        store: the slots, with what each of them holds.
        attached: inside a forward of a model under `evict`.
        unites: the next tokens go into one block, whatever the lists.
        decode_policy: what evicts from this layer while tokens are generated, None = nothing does.
        position_shift: [batch_size] int64, how many rows of the prompt this layer does not have;
            new tokens stand that much further down. None = they stand where they are.
        restarted: [batch_size] bool, the sequences of which that holds.
    """

    def __init__(self, store: LayerSlots) -> None:
        super().__init__()
        self.store = store
        self.is_initialized = True
        self.attached = False
        self.unites = False
        self.decode_policy: DecodePolicy | None = None
        self.position_shift: Tensor | None = None
        self.restarted: Tensor | None = None
        block = store.buckets[0].keys
        self.dtype, self.device = block.dtype, block.device
        self.show()

    def show(self) -> None:
        """Point `keys` and `values` at what is stored now."""
        single = self.store.is_one_block
        self.keys: Tensor | None = self.store.slots.keys if single else None
        self.values: Tensor | None = self.store.slots.values if single else None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; refused outside of `evict`, where nobody would mask this layer rightly.

        Returns:
            All keys and values, or the new ones alone where `keys` is None: attention of ours reads
            the store.
        """
        if not self.attached:
            raise RuntimeError(
                "kvevict: this cache was evicted; continue it inside `with kvevict.evict(...)`"
            )
        if self.unites:
            self.store.unite()
            self.unites = False
        self.store.append(key_states, value_states)
        self.show()
        if self.keys is None or self.values is None:
            return key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the length of the conversation, evicted tokens included."""
        return self.store.seen_len if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as far as they came after the eviction."""
        if tokens_to_remove > 0:
            raise ValueError(f"kvevict: crop takes a negative number, got {tokens_to_remove}")
        if self.is_initialized:
            self.store.crop(-tokens_to_remove)
            self.show()

    def reset(self) -> None:
        """Forget everything; the next forward starts with an ordinary layer."""
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences, for beam search."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._take(torch.arange(self.store.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self._take(indices)

    def _take(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        self.store.take(index)
        if self.position_shift is not None and self.restarted is not None:
            index = index.to(self.position_shift.device)
            self.position_shift = self.position_shift[index]
            self.restarted = self.restarted[index]
        self.show()
