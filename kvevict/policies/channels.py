"""Methods that drop channels of the cached keys.

A `ChannelPolicy` decides, per sequence and KV head, which channels of the older keys are stored;
queries are multiplied with those only. Which tokens stay is decided elsewhere: by a
`PrefillPolicy`, often the same object, or by nobody, and then all do. `kvevict.channels` stores
such layers.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from kvevict.policies.base import Prompt


@runtime_checkable
class ChannelPolicy(Protocol):
    """Decides once, in every layer of the prompt, which channels of its keys stay."""

    @property
    def num_recent(self) -> int:
        """How many of the newest keys keep all channels; all later ones do."""
        ...

    def channels(self, query: Tensor, key: Tensor, prompt: Prompt) -> Tensor:
        """Choose the channels of one layer.

        Args:
            query: [batch_size, num_qo_heads, qo_len, head_dim], as attention uses it (rotated).
            key: [batch_size, num_kv_heads, kv_len, head_dim], as cached.
            prompt: what the keys are.

        Returns:
            [batch_size, num_kv_heads, num_channels] int32, ascending; head_dim of them = all stay.
        """
        ...
