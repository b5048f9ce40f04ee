"""ThinK: channels of the keys that the queries do not use (arXiv 2407.21018)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies.base import LayerScores, Policy, PrefillPolicy, Prompt, observer
from kvevict.policies.between import LayerPolicy
from kvevict.policies.channels import ChannelPolicy
from kvevict.policies.decode import DecodePolicy
from kvevict.policies.merging import MergingPolicy


@dataclass(frozen=True)
class KeepAll(Policy):
    """Every token stays: the host of a method that saves something else."""

    keep: float | int | None = field(default=1.0, init=False)
    num_sink: int = field(default=0, init=False)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **_: Any,
    ) -> LayerScores:
        """Score nothing [batch_size, 1, kv_len]."""
        return LayerScores(torch.zeros(prompt.modality.shape, device=key.device)[:, None], prompt)


@dataclass(frozen=True)
class ThinK:
    r"""The channels of K that matter least to the last queries are not stored.

    Channel c of KV head g scores $\overline{q_c^2} \cdot \overline{k_c^2}$: the mean of its squares
    over the group's query heads and the last `window` real rows, times that over all real keys of
    the prompt. The $\lfloor D \cdot ratio \rfloor$ lowest of D go, per sequence and KV head, at
    equal scores those further behind; V stays whole. q and k are the rotated ones, as cached. The
    newest `num_recent` of the kept keys and all later ones keep every channel. Attention is exact
    on what is stored: queries are restricted to the same channels, logits are not rescaled.

    The published code zeroes the channels or packs them for a single sequence; here they take no
    memory. It takes the mean over the keys that a host has kept, here it is over the whole prompt.

    A host decides which tokens stay, as it would alone; its `keep` counts tokens. Of each kept
    token but the newest `num_recent`, a KV head then stores $2D - \lfloor D \cdot ratio \rfloor$
    numbers in place of 2D, so 0.8 of the bytes at the default ratio.

    Attributes:
        host: the token method, any `PrefillPolicy`; every token stays by default.
        ratio: share of the channels that go, in [0, 1).
        window: rows that vote.
        num_recent: newest keys that keep all channels.

    Raises:
        ValueError: if a field is out of range, or the host merges, evicts while decoding, drops
            rows between layers or drops channels itself.
    """

    host: PrefillPolicy = field(default_factory=KeepAll)
    ratio: float = 0.4
    window: int = 32
    num_recent: int = 32

    def __post_init__(self) -> None:
        for name, minimum in (("window", 1), ("num_recent", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
                raise ValueError(
                    f"ThinK: {name} must be an int of at least {minimum}, got {value!r}"
                )
        is_number = isinstance(self.ratio, Real) and not isinstance(self.ratio, bool)
        if not is_number or not 0 <= self.ratio < 1:
            raise ValueError(f"ThinK: ratio must be in [0, 1), got {self.ratio!r}")
        host = self.host
        if not isinstance(host, PrefillPolicy) or isinstance(host, ChannelPolicy):
            raise ValueError(
                f"ThinK: host must be a PrefillPolicy that leaves channels alone, got {host!r}"
            )
        if isinstance(host, DecodePolicy) and host.evicts_while_decoding:
            raise ValueError(
                f'ThinK: host must not evict while decoding (decode="append"), got {host!r}'
            )
        if isinstance(host, MergingPolicy):
            raise ValueError(f"ThinK: host must not merge, got {host!r}")
        if isinstance(host, LayerPolicy) and host.shortening_layers(sys.maxsize):
            raise ValueError(f"ThinK: host must not drop rows between layers, got {host!r}")

    # Channels

    def channels(self, query: Tensor, key: Tensor, prompt: Prompt) -> Tensor:
        """Keep the channels of the largest product of norms; see `ChannelPolicy.channels`."""
        batch_size, num_kv_heads, _, head_dim = key.shape
        # Norms order channels as the means of squares do.
        rows = _last_rows(prompt, self.window)
        sequence = torch.arange(batch_size, device=key.device)[:, None]
        voters = query[sequence, :, rows.clamp(min=0)].masked_fill((rows < 0)[..., None, None], 0)
        group_size = query.shape[1] // num_kv_heads
        voters = voters.view(batch_size, rows.shape[1], num_kv_heads, group_size, head_dim)
        of_query = torch.linalg.vector_norm(voters, dim=(1, 3), dtype=torch.float32)
        if prompt.key_mask is not None:
            key = key.masked_fill(~prompt.key_mask[:, None, :, None], 0)
        of_key = torch.linalg.vector_norm(key, dim=2, dtype=torch.float32)
        kept, _ = ops.select_topk(of_query * of_key, head_dim - int(head_dim * self.ratio))
        return kept

    # Tokens

    def row_index(self, prompt: Prompt) -> Tensor | None:
        """Return the host's rows."""
        return self.host.row_index(prompt)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        **options: Any,
    ) -> LayerScores:
        """Let the host score the keys."""
        return self.host.observe(query, key, value, prompt, row_index, **options)

    def observe_later(self, first: LayerScores, *tensors: Any, **options: Any) -> LayerScores:
        """Let the host score a later layer; see `SharingPolicy.observe_later`."""
        return observer(self.host, first)(*tensors, **options)

    def revise(self, layers: Sequence[LayerScores]) -> Sequence[LayerScores]:
        """Let the host revise them."""
        return self.host.revise(layers)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Return the host's budgets."""
        return self.host.budgets(layers)

    def select(self, layer: LayerScores, budget: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Keep what the host keeps."""
        return self.host.select(layer, budget, k)


def _last_rows(prompt: Prompt, count: int) -> Tensor:
    """Return the rows of the last `count` real keys, as `Prompt.last_rows` but for their order.

    Nothing is read back from the device, so this may be called in every layer.
    """
    real = (prompt.valid & (prompt.rank_from_end < count))[:, prompt.kv_len - prompt.num_queries :]
    row = torch.arange(real.shape[1], device=real.device)
    return row.where(real, -1).sort(1).values[:, -count:]
