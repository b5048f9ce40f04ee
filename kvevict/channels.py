"""Layers whose older keys lack some channels.

The older keys of a KV head have the channels that were chosen for it, the newer ones all: two
`LayerSlots`, of which only the newer grows. Attention is exact on both together.

It works on tensors and knows neither a framework nor a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvevict.policies.base import Selection
from kvevict.slots import LayerSlots, Slots, select_slots

ROW_BLOCK = 64
"""Query rows whose logits are held at once, in float32."""


class PackedSlots(LayerSlots):
    """A layer of slots with whole keys, behind older ones whose keys lack channels.

    What `LayerSlots` says of its blocks holds for the newer keys; appending and cropping are theirs
    alone.

    Attributes:
        older: the older keys [..., num_channels] with their values.
        channels: [batch_size, num_kv_heads, num_channels] int32, those that they have, ascending.
    """

    def __init__(self, newer: LayerSlots, older: LayerSlots, channels: Tensor) -> None:
        super().__init__(
            newer.buckets,
            newer.members,
            batch_size=newer.batch_size,
            num_lists=newer.num_lists,
        )
        self.older = older
        self.channels = channels

    @property
    def is_one_block(self) -> bool:
        """Never."""
        return False

    @property
    def blocks(self) -> tuple[Slots, ...]:
        """The blocks of older and newer keys."""
        return (*self.older.blocks, *super().blocks)

    @property
    def num_bookkeeping_bytes(self) -> int:
        """Bytes of everything else that is kept per slot, and of the channels."""
        return super().num_bookkeeping_bytes + self.channels.untyped_storage().nbytes()

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        attend_block: Callable[..., Tensor],
    ) -> Tensor:
        """Attend with the newest rows to older and newer keys; exact.

        Args:
            query: [batch_size, num_qo_heads, qo_len, head_dim].
            mask: [batch_size, seen_len] bool of the conversation, None = no padding.
            attend_block: `attend_with_lse` of a scale.

        Returns:
            [batch_size, qo_len, num_qo_heads, head_dim].
        """
        groups = _by_group(query, self.channels.shape[1])
        index = self.channels.long()[:, :, None, None].expand(*groups.shape[:-1], -1)
        narrow = groups.gather(-1, index).flatten(1, 2)
        older = self.older.attend(narrow, mask, partial(attend_block, causal=False))
        newer = super().attend(query, mask, attend_block)
        lse = torch.logaddexp(older[..., -1:], newer[..., -1:])
        lse = lse.clamp(min=torch.finfo(lse.dtype).min)  # A padding row sees nothing.
        parts = [part[..., :-1] * (part[..., -1:] - lse).exp() for part in (older, newer)]
        return (parts[0] + parts[1]).to(query.dtype)

    def note_turn(self, modality: Tensor, mask: Tensor | None) -> None:
        """Say what the last slots are; see `Slots.note_turn`."""
        super().note_turn(modality, mask)
        self.older.note_turn(modality[:, :0], mask)

    def tags(self) -> Tensor:
        """Return the tags of all lists [batch_size, num_lists, stored, 3], the older first."""
        return torch.cat([self.older.tags(), super().tags()], 2)

    def unite(self) -> None:
        """Refuse: keys without some channels cannot be scored again.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "kvevict: a cache whose keys lack channels cannot be evicted again (every_turn=True)"
        )

    def take(self, index: Tensor) -> None:
        """Let sequence i be sequence `index[i]`; see `LayerSlots.take`."""
        super().take(index)
        self.older.take(index)
        self.channels = self.channels.index_select(0, index.to(self.channels.device))


def pack_slots(
    block: Slots, selection: Selection, channels: Tensor, *, num_recent: int
) -> PackedSlots:
    """Copy the keys that stay into fresh memory, the older ones without the other channels.

    Args:
        block: one layer, its slots in the conversation's order.
        selection: the keys that stay.
        channels: [batch_size, num_kv_heads, num_channels] int32, ascending.
        num_recent: newest keys of every list that stay whole.

    One layer's older keys are held with and without their other channels for a moment.
    """
    older, newer = select_slots([block, block], split_recent(selection, num_recent))
    older.narrow(channels)
    return PackedSlots(newer, older, channels)


def split_recent(selection: Selection, num_recent: int) -> tuple[Selection, Selection]:
    """Split every list into its older keys and its newest `num_recent`."""
    indices, lens = selection.kept_indices, selection.kept_lens
    newer_lens = lens.clamp(max=num_recent)
    older_lens = lens - newer_lens
    k = indices.shape[-1]
    num_newer = min(num_recent, k)
    slot = torch.arange(k, device=indices.device)
    older = indices.where(slot < older_lens[..., None], -1)[..., : k - num_newer].contiguous()
    place = older_lens[..., None] + slot[:num_newer]
    newer = indices.gather(-1, place.clamp(max=k - 1).long())
    newer = newer.where(slot[:num_newer] < newer_lens[..., None], -1)
    return (
        Selection(older, older_lens, ragged=selection.ragged),
        Selection(newer, newer_lens, ragged=selection.ragged),
    )


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    *,
    sm_scale: float,
    causal: bool = True,
) -> Tensor:
    """Attend, and tell how much attention there was to give.

    Logits are products in the dtype of the keys; what follows is float32 but for the product of
    weights and values.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim], the newest rows.
        key: [batch_size, num_kv_heads, kv_len, head_dim].
        value: like key, but for head_dim.
        visible: [batch_size, 1 | num_kv_heads, kv_len] bool, None = all.
        sm_scale: the scale of the logits.
        causal: the last keys are those of the rows; else all are older.

    Returns:
        [batch_size, qo_len, num_qo_heads, head_dim + 1] float32: the output, and the log-sum-exp of
        the logits behind it. A row that sees nothing gets zeros and -inf.
    """
    qo_len, kv_len = query.shape[2], key.shape[2]
    groups = _by_group(query * sm_scale, key.shape[1])
    seen = None if visible is None else visible[:, :, None, None]
    column = torch.arange(kv_len, device=key.device)
    outputs = []
    for begin in range(0, qo_len, ROW_BLOCK):
        rows = groups[:, :, :, begin : begin + ROW_BLOCK]
        logits = (rows.flatten(2, 3) @ key.mT).view(*rows.shape[:4], kv_len).float()
        if causal and qo_len > 1:
            own = column[kv_len - qo_len + begin :][: rows.shape[3], None]
            logits = logits.masked_fill(column > own, -torch.inf)
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        weights = (logits - lse.clamp(min=torch.finfo(lse.dtype).min)).exp().to(value.dtype)
        output = (weights.flatten(2, 3) @ value).view(*rows.shape[:4], value.shape[3])
        outputs.append(torch.cat([output.float(), lse], -1))
    return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2)


def _by_group(query: Tensor, num_kv_heads: int) -> Tensor:
    """Turn [batch_size, num_qo_heads, ...] into [batch_size, num_kv_heads, group_size, ...]."""
    batch_size, num_qo_heads = query.shape[:2]
    shape = (batch_size, num_kv_heads, num_qo_heads // num_kv_heads)
    return query.reshape(*shape, *query.shape[2:])
