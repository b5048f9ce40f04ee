"""Evict the KV cache of Hugging Face models: `with kvevict.evict(model, policy): ...`.

How it works. Inside the context the text decoder uses an attention function of ours, registered
with transformers next to "sdpa" and "eager"; the vision tower keeps its own. It calls the same
SDPA kernels, and while the prompt passes through it lets the policy score each layer. A hook
behind the last layer then selects, and copies what stays into tensors of exactly that size: the
full-size storages are freed. Each layer of the cache becomes an `EvictedLayer`, which knows the
true length of the conversation, so positions (M-RoPE too) stay what they would be without eviction.

A policy that drops channels of the keys leaves layers of two parts, older keys without them and
newer ones with all; attention of ours goes over both.

A policy that acts between layers gets hooks around the decoder's layers; one that acts while
decoding sees every step's attention, and drops keys after the last layer.

Attention never needs a mask of prompt x prompt: a left-padded batch is computed row by row on the
real tokens, a later turn in blocks of `QUERY_BLOCK` rows.
"""

from kvevict.integrations.transformers.context import ATTENTION_NAME, Eviction, evict
from kvevict.integrations.transformers.layer import EvictedLayer
from kvevict.integrations.transformers.reports import (
    CacheReport,
    EvictionReport,
    KeptLayer,
    LayerReport,
    report,
)

__all__ = [
    "ATTENTION_NAME",
    "CacheReport",
    "EvictedLayer",
    "Eviction",
    "EvictionReport",
    "KeptLayer",
    "LayerReport",
    "evict",
    "report",
]
