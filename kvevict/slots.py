"""Where the kept keys and values of a layer live: slots with slack, and what each slot holds.

`Slots` is one block of memory. All its lists have the same number of slots, some of which may be
empty, and room to grow: appending a token writes one row, and copies the block only every so often.

`LayerSlots` is a layer. Lists of about equal length share a block (a bucket), so that a cache of
which every KV head keeps a different number of tokens takes little more memory than those tokens.

Both work on tensors and know neither a framework nor a policy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies.base import Selection, compact_layers

if TYPE_CHECKING:
    from kvevict.policies.decode import Victims

COLUMN, POSITION, MODALITY = 0, 1, 2
"""What a slot's tag says: the column of the (padded) conversation, -1 = the slot is empty; how many
real tokens of the sequence came before; the code of `kvevict.policies.Prompt`."""

OF_NEW = {"score": 0.0, "weight": 1.0}
"""Numbers that may be kept with every slot, and what they are of a new key."""

BUCKET_WASTE = 1.25
"""Slots per kept token that a layer may take; beyond that its lists are put into buckets."""

SLACK_SHARE, MIN_SLACK = 8, 32
"""A full block grows by an eighth, or by 32 slots if that is more."""


class Slots:
    """Keys and values of lists that are equally long, with room for more.

    A list is what one choice of keys is made for: a sequence, where its heads share the choice, or
    one KV head of it. Slots are in no particular order once keys were evicted while decoding.

    Attributes:
        stored: slots in use; some may be empty.
        seen_len: columns of the conversation so far, evicted and padding ones included.
        padding_lens: [batch_size] int32, how many of these columns are padding.
        has_empty: some used slot may be empty (read by the host, hence kept).
        num_kept: the first slots, those left by the last eviction.
        is_ordered: the keys are in the order of the conversation.
        grown: keys per list that were appended minus those that were evicted since the last
            eviction of a prompt: int where that is the same for all lists, else [batch_size,
            num_lists] int64. The host decides by it without asking the device.
        pending: slots appended since keys were last evicted.
        memory: what a decode policy remembers of this layer; tensors start with batch_size.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        tags: Tensor,
        *,
        seen_len: int,
        padding_lens: Tensor,
        has_empty: bool,
    ) -> None:
        """Take over tensors that are exactly full.

        Args:
            keys: [batch_size, num_kv_heads, stored, head_dim].
            values: like keys, but for head_dim.
            tags: [batch_size, 1 | num_kv_heads, stored, 3] int32, see `COLUMN`.
            seen_len: as the attribute.
            padding_lens: as the attribute.
            has_empty: as the attribute.
        """
        self._keys, self._values, self._tags = keys, values, tags
        self._numbers: dict[str, Tensor] = {}  # By name in OF_NEW, shaped like the tags.
        self._num_tagged = keys.shape[2]
        self._has_holes = False  # Left by lists that dropped fewer keys than others did.
        self.stored = keys.shape[2]
        self.seen_len = seen_len
        self.padding_lens = padding_lens
        self.has_empty = has_empty
        self.num_kept = self.stored
        self.is_ordered = True
        self.grown: int | Tensor = 0
        self.pending = 0
        self.memory: dict[str, int | float | Tensor] = {}

    # What is stored

    @property
    def keys(self) -> Tensor:
        """[batch_size, num_kv_heads, stored, head_dim]."""
        return self._keys[:, :, : self.stored]

    @property
    def values(self) -> Tensor:
        """[batch_size, num_kv_heads, stored, head_dim]."""
        return self._values[:, :, : self.stored]

    @property
    def columns(self) -> Tensor:
        """[batch_size, num_lists, stored] int32: the column of each key, -1 = empty."""
        return self._tags[:, :, : self.stored, COLUMN]

    @property
    def positions(self) -> Tensor:
        """[batch_size, num_lists, stored] int32: real tokens before each key."""
        return self._tags[:, :, : self.stored, POSITION]

    @property
    def modality(self) -> Tensor:
        """[batch_size, num_lists, stored] int32."""
        return self._tags[:, :, : self.stored, MODALITY]

    @property
    def scores(self) -> Tensor:
        """[batch_size, num_lists, stored] float32, a decode policy's own; 0 for a new key."""
        assert "score" in self._numbers, "call track first"
        return self._numbers["score"][:, :, : self.stored, 0]

    @property
    def key_weight(self) -> Tensor | None:
        """[batch_size, num_lists, stored] float32: tokens that each key counts for in attention.

        1 for a new key; None = one each.
        """
        weights = self._numbers.get("weight")
        return None if weights is None else weights[:, :, : self.stored, 0]

    @property
    def live(self) -> Tensor | None:
        """[batch_size, num_lists, stored] bool: slots that hold a key, None = all."""
        return self.columns >= 0 if self.has_empty else None

    @property
    def lens(self) -> Tensor:
        """[batch_size, num_lists] int64: keys per list."""
        return (self.columns >= 0).sum(-1)

    @property
    def totals(self) -> Tensor:
        """[batch_size] int32: real tokens of the conversation."""
        return self.seen_len - self.padding_lens

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages of keys and values, slack included."""
        return sum(t.untyped_storage().nbytes() for t in (self._keys, self._values))

    @property
    def num_bookkeeping_bytes(self) -> int:
        """Bytes of the tags, scores and weights."""
        tensors = (self._tags, *self._numbers.values())
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def track(self, scores: Tensor) -> None:
        """Keep a score with every slot, moved and dropped with it.

        Args:
            scores: [batch_size, 1 | num_kv_heads, stored] float32, of the keys stored now. Scores
                per KV head of keys that share a list make it a list per KV head.
        """
        self._keep_number("score", scores)

    def weigh(self, key_weight: Tensor) -> None:
        """Let keys count for several tokens in attention; moved and dropped with them.

        Args:
            key_weight: [batch_size, 1 | num_kv_heads, stored] float32, positive where a slot holds
                a key, of the keys stored now. Lists as in `track`.
        """
        self._keep_number("weight", key_weight)

    def _keep_number(self, name: str, given: Tensor) -> None:
        batch_size, num_lists, capacity, _ = self._tags.shape
        if given.shape[1] > num_lists:
            num_lists = given.shape[1]
            self._each_kept(lambda block: block.expand(-1, num_lists, -1, -1).contiguous())
        block = given.new_full((batch_size, num_lists, capacity, 1), OF_NEW[name])
        block[:, :, : self.stored, 0] = given
        self._numbers[name] = block

    # Appending

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append the next columns of the conversation, real tokens all.

        O(number of new tokens), amortized.

        Args:
            keys: [batch_size, num_kv_heads, num_new, head_dim].
            values: like keys, but for head_dim.
        """
        num_new = keys.shape[2]
        self._make_room(num_new)
        begin, end = self.stored, self.stored + num_new
        self._keys[:, :, begin:end] = keys.detach()
        self._values[:, :, begin:end] = values.detach()
        if end > self._num_tagged:
            self._tag(self._keys.shape[2])
        self.stored = end
        self.seen_len += num_new
        self.grown = self.grown + num_new
        self.pending += num_new

    def _make_room(self, num_new: int) -> None:
        # A tensor made in inference mode cannot be written to outside of it.
        frozen = self._keys.is_inference() and not torch.is_inference_mode_enabled()
        capacity = self._keys.shape[2]
        if self.stored + num_new <= capacity and not frozen:
            return
        slack = max(self.stored // SLACK_SHARE, MIN_SLACK)
        if self._has_holes and not frozen:
            self._close_ranks()
            if self.stored + num_new + slack // 2 <= capacity:
                return
        self._resize(self.stored + num_new + slack)

    def _resize(self, capacity: int) -> None:
        def resized(tensor: Tensor) -> Tensor:
            new = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[3]))
            new[:, :, : self.stored] = tensor[:, :, : self.stored]
            return new

        self._each(resized)
        self._num_tagged = self.stored

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every block; the slots are its dimension 2."""
        self._keys, self._values = change(self._keys), change(self._values)
        self._each_kept(change)

    def _each_kept(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is kept beside keys and values."""
        self._tags = change(self._tags)
        self._numbers = {name: change(block) for name, block in self._numbers.items()}

    def _tag(self, end: int) -> None:
        """Write what the slots from `stored` on will hold: the columns to come, one by one."""
        begin = self.stored
        column = torch.arange(end - begin, device=self._tags.device, dtype=torch.int32)
        column = (column + self.seen_len)[None, None]
        self._tags[:, :, begin:end, COLUMN] = column
        self._tags[:, :, begin:end, POSITION] = column - self.padding_lens[:, None, None]
        self._tags[:, :, begin:end, MODALITY] = 0
        for name, block in self._numbers.items():
            block[:, :, begin:end] = OF_NEW[name]
        self._num_tagged = end

    def note_turn(self, modality: Tensor, mask: Tensor | None) -> None:
        """Say what the last slots, appended by a turn of several tokens, are.

        Args:
            modality: [batch_size, num_new] of the last slots.
            mask: [batch_size, seen_len] bool of the conversation, None = no padding. Reading
                whether the turn has padding synchronizes with the device.
        """
        num_new = modality.shape[1]
        begin = self.stored - num_new
        self._tags[:, :, begin : self.stored, MODALITY] = modality[:, None].int()
        # Slots behind are tagged again: positions depend on the padding.
        self._num_tagged = self.stored
        if mask is None:
            return
        columns = self.columns
        real = mask.gather(1, columns.clamp(min=0).flatten(1).long()).view_as(columns)
        columns.masked_fill_(~real, -1)
        self.has_empty = True
        new = mask[:, mask.shape[1] - num_new :]
        if not bool(new.all()):
            position = self.totals[:, None] - num_new + new.cumsum(1) - new.long()
            self._tags[:, :, begin : self.stored, POSITION] = position[:, None].int()
            num_padding = num_new - new.sum(1)
            self.padding_lens = self.padding_lens + num_padding.int()
            grown = num_padding[:, None].expand(-1, self._tags.shape[1])
            self.grown = self.grown - grown

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Return which slots may be attended [batch_size, num_lists, stored], None = all.

        Args:
            mask: [batch_size, seen_len] bool of the conversation, None = no padding.
        """
        live = self.live
        if mask is None:
            return live
        columns = self.columns
        real = mask.gather(1, columns.clamp(min=0).flatten(1).long()).view_as(columns)
        return real & (columns >= 0)

    def biased(self, visible: Tensor | None) -> Tensor | None:
        """Return what attention is masked with: `visible`, or where keys have weights their logs.

        Args:
            visible: as `visible` returns it.

        Returns:
            `visible`, or [batch_size, num_lists, stored] float32 to be added to the logits, -inf
            where a slot may not be attended.
        """
        if self.key_weight is None:
            return visible
        bias = self.key_weight.log()
        return bias if visible is None else bias.masked_fill(~visible, -torch.inf)

    # Removing

    def narrow(self, channels: Tensor) -> None:
        """Leave some channels of the keys, in fresh memory of exactly that size.

        Args:
            channels: [batch_size, num_kv_heads, num_channels] int32.
        """
        index = channels.long()[:, :, None].expand(-1, -1, self.stored, -1)
        self._keys = self.keys.gather(3, index)

    def _forget(self, most: int, evicted_lens: Tensor | None) -> None:
        """Take the last slots, whose keys have moved into the holes, out of use."""
        if evicted_lens is None:
            self.stored -= most
            self._num_tagged = self.stored
            self.grown = self.grown - most
        else:
            count = evicted_lens.long()
            tail = torch.arange(self.stored - most, self.stored, device=count.device)
            freed = tail >= self.stored - count[..., None]
            self.columns[..., self.stored - most :].masked_fill_(freed, -1)
            self.has_empty = self._has_holes = True
            self.grown = self.grown - count
        self.num_kept = self.stored
        self.is_ordered = False
        self.pending = 0

    def _close_ranks(self) -> None:
        """Move the keys of all lists to the front; synchronizes with the device."""
        live = self.columns >= 0
        stored = int(live.sum(-1).max())
        self._keep_order(torch.where(live, 0, 1), stored)
        self._has_holes = False

    def sort(self) -> None:
        """Bring the keys into the order of the conversation, empty slots last. O(stored)."""
        self._make_room(0)
        columns = self.columns
        last = torch.iinfo(columns.dtype).max
        self._keep_order(columns.where(columns >= 0, last), self.stored)
        self.is_ordered = True

    def _keep_order(self, order: Tensor, stored: int) -> None:
        """Sort the slots by `order` [batch_size, num_lists, stored] and keep the first ones."""
        index = order.sort(dim=-1, stable=True).indices[..., :stored, None]

        def sorted_block(block: Tensor) -> Tensor:
            shape = (-1, block.shape[1], -1, block.shape[3])
            block[:, :, :stored] = block.gather(2, index.expand(shape))
            return block

        self._each(sorted_block)
        self.stored = self._num_tagged = self.num_kept = stored

    def crop(self, num_tokens: int) -> None:
        """Take the last tokens back.

        Raises:
            ValueError: if some of them came before the last eviction, or a decode policy has seen
                them.
        """
        later = 0 if "score" in self._numbers else self.stored - self.num_kept
        if num_tokens > later:
            raise ValueError(
                f"kvevict: only the {later} tokens that came after the eviction can be taken "
                f"back, got {num_tokens} (assisted generation feeds its first draft together with "
                "the prompt, and is not supported; nor is it while tokens are evicted in decoding)"
            )
        padding = self.columns[:, 0, self.stored - num_tokens :] < 0
        self.padding_lens = self.padding_lens - padding.sum(-1, dtype=torch.int32)
        self.stored -= num_tokens
        self.seen_len -= num_tokens
        self.grown = self.grown - num_tokens
        self._num_tagged = self.stored

    # The batch

    def take(self, index: Tensor) -> Slots:
        """Return slots of which sequence i is sequence `index[i]` of these."""
        index = index.to(self._keys.device)
        new = copy.copy(self)
        new._each(lambda block: block.index_select(0, index))
        new.padding_lens = self.padding_lens.index_select(0, index)
        new.memory = {
            name: value.index_select(0, index) if isinstance(value, Tensor) else value
            for name, value in self.memory.items()
        }
        if isinstance(self.grown, Tensor):
            new.grown = self.grown.index_select(0, index)
        return new


def evict_layers(layers: Sequence[Slots], victims: Sequence[Victims | None]) -> None:
    """Drop keys of several layers; the newest keys move into the holes.

    O(number of dropped keys). Slots lose their order. Layers that are equally long and drop equally
    many keys share two launches: one moves keys and values, one what is known about them (a third
    one if there is a weight and a score of each).

    Args:
        layers: one block per layer.
        victims: per layer, None = nothing. Where `evicted_lens` is None the slots at the end are
            free again, else they stay in use as holes.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (layer, own) in enumerate(zip(layers, victims, strict=True)):
        if own is not None and own.slots.shape[-1] > 0:
            shape = (*own.slots.shape, *layer._keys.shape[:2], layer.stored)
            groups.setdefault((shape, *layer._numbers), []).append(i)
    for members in groups.values():
        blocks = [layers[i] for i in members]
        chosen = [own for i in members if (own := victims[i]) is not None]
        index = torch.stack([own.slots for own in chosen])
        lens = torch.full_like(index[0, :, :, 0], blocks[0].stored)
        ops.evict_slots_([b._keys for b in blocks], [b._values for b in blocks], index, lens)
        # Two kinds of rows at a time; of an odd one out the other has no width.
        kinds = [[b._tags for b in blocks]]
        kinds += [[b._numbers[name] for b in blocks] for name in blocks[0]._numbers]
        for first in range(0, len(kinds), 2):
            rows = kinds[first]
            others = kinds[first + 1] if first + 1 < len(kinds) else [r[..., :0] for r in rows]
            ops.evict_slots_(rows, others, index, lens)
        for block, own in zip(blocks, chosen, strict=True):
            block._forget(min(own.slots.shape[-1], block.stored), own.evicted_lens)


class LayerSlots:
    """The slots of one layer, in as many blocks as its lists need.

    Attributes:
        buckets: the blocks. A single one holds whole sequences: [batch_size, num_kv_heads, ...].
            Of several, each holds lists of about equal length: [lists in it, 1, ...] where every KV
            head has a list of its own, else [lists in it, num_kv_heads, ...].
        members: per bucket the lists in it, [lists in it] int64, list = sequence * num_lists +
            head; None where there is a single block.
        batch_size: sequences.
        num_lists: 1, or one per KV head.
    """

    def __init__(
        self,
        buckets: Sequence[Slots],
        members: Sequence[Tensor] | None = None,
        *,
        batch_size: int,
        num_lists: int,
    ) -> None:
        self.buckets = tuple(buckets)
        self.members = None if members is None else tuple(members)
        self.batch_size = batch_size
        self.num_lists = num_lists

    @classmethod
    def of(cls, slots: Slots) -> LayerSlots:
        """Return a layer that is one block."""
        batch_size, num_lists = slots.columns.shape[:2]
        return cls([slots], batch_size=batch_size, num_lists=num_lists)

    @property
    def blocks(self) -> tuple[Slots, ...]:
        """Everything that holds keys and values."""
        return self.buckets

    @property
    def is_one_block(self) -> bool:
        """Whether `slots` is all there is."""
        return self.members is None

    @property
    def slots(self) -> Slots:
        """The only block.

        Raises:
            ValueError: if there are several.
        """
        if self.members is not None:
            raise ValueError("kvevict: the lists of this layer differ in length, see `buckets`")
        return self.buckets[0]

    @property
    def seen_len(self) -> int:
        """Columns of the conversation so far."""
        return self.buckets[0].seen_len

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages of keys and values, slack included."""
        return sum(block.num_bytes for block in self.blocks)

    @property
    def num_bookkeeping_bytes(self) -> int:
        """Bytes of everything else that is kept per slot."""
        return sum(block.num_bookkeeping_bytes for block in self.blocks)

    def _fold(self, tensor: Tensor) -> Tensor:
        """Turn [batch_size, heads, ...] into [batch_size * num_lists, heads per list, ...]."""
        if self.num_lists == 1:
            return tensor
        heads = tensor.shape[1] // self.num_lists
        return tensor.reshape(-1, heads, *tensor.shape[2:])

    def _repeat(self, tensor: Tensor) -> Tensor:
        """Turn [batch_size, ...] into [batch_size * num_lists, ...]."""
        return tensor.repeat_interleave(self.num_lists, 0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append the next columns of the conversation; see `Slots.append`."""
        if self.members is None:
            self.slots.append(keys, values)
            return
        keys, values = self._fold(keys), self._fold(values)
        for bucket, members in zip(self.buckets, self.members, strict=True):
            bucket.append(keys.index_select(0, members), values.index_select(0, members))

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        attend_block: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Attend with the newest rows, block by block; exact.

        Args:
            query: [batch_size, num_qo_heads, qo_len, head_dim].
            mask: [batch_size, seen_len] bool of the conversation, None = no padding.
            attend_block: attention of (query, keys, values, mask) that gives [batch_size, qo_len,
                num_qo_heads, *]; the mask is what `Slots.biased` returns.

        Returns:
            [batch_size, qo_len, num_qo_heads, head_dim].
        """
        if self.members is None:
            slots = self.slots
            return attend_block(query, slots.keys, slots.values, slots.biased(slots.visible(mask)))
        folded = self._fold(query)
        masks = None if mask is None else self._repeat(mask)
        outputs = []
        for bucket, members in zip(self.buckets, self.members, strict=True):
            visible = bucket.visible(None if masks is None else masks.index_select(0, members))
            rows = folded.index_select(0, members)
            outputs.append(attend_block(rows, bucket.keys, bucket.values, bucket.biased(visible)))
        order = torch.cat(self.members).sort().indices
        output = torch.cat(outputs).index_select(0, order)
        if self.num_lists == 1:
            return output
        output = output.view(self.batch_size, self.num_lists, *output.shape[1:])
        return output.transpose(1, 2).flatten(2, 3)

    def note_turn(self, modality: Tensor, mask: Tensor | None) -> None:
        """Say what the last slots are; see `Slots.note_turn`."""
        if self.members is None:
            self.slots.note_turn(modality, mask)
            return
        modality = self._repeat(modality)
        masks = None if mask is None else self._repeat(mask)
        for bucket, members in zip(self.buckets, self.members, strict=True):
            own = None if masks is None else masks.index_select(0, members)
            bucket.note_turn(modality.index_select(0, members), own)

    def tags(self) -> Tensor:
        """Return the tags of all lists [batch_size, num_lists, stored, 3]; see `COLUMN`."""
        tags = [bucket._tags[:, :, : bucket.stored] for bucket in self.buckets]
        return self._united(tags, self.num_lists, -1)

    def unite(self) -> None:
        """Put everything into one block, as long as its longest list, in the conversation's order.

        For a turn that is about to be scored; the memory it takes is gone after the eviction.
        """
        if self.members is None:
            if not self.slots.is_ordered:
                self.slots.sort()
            return
        num_kv_heads = self.buckets[0].keys.shape[1] * self.num_lists
        padding = torch.cat([bucket.padding_lens for bucket in self.buckets])
        order = torch.cat(self.members).sort().indices
        slots = Slots(
            self._united([bucket.keys for bucket in self.buckets], num_kv_heads, 0),
            self._united([bucket.values for bucket in self.buckets], num_kv_heads, 0),
            self.tags(),
            seen_len=self.seen_len,
            padding_lens=padding.index_select(0, order)[:: self.num_lists],
            has_empty=True,
        )
        weights = [w[..., None] for bucket in self.buckets if (w := bucket.key_weight) is not None]
        if weights:
            slots.weigh(self._united(weights, self.num_lists, 1)[..., 0])
        self.buckets, self.members = (slots,), None

    def _united(self, blocks: Sequence[Tensor], num_heads: int, fill: int) -> Tensor:
        """Put blocks into one [batch_size, num_heads, longest, *], `fill` behind the shorter."""
        if self.members is None:
            return blocks[0]
        _, heads, _, width = blocks[0].shape
        longest = max(block.shape[2] for block in blocks)
        shape = (self.batch_size * self.num_lists, heads, longest, width)
        united = blocks[0].new_full(shape, fill)
        for block, members in zip(blocks, self.members, strict=True):
            united[members, :, : block.shape[2]] = block
        return united.reshape(self.batch_size, num_heads, longest, -1)

    def narrow(self, channels: Tensor) -> None:
        """Leave some channels of the keys; see `Slots.narrow`."""
        if self.members is None:
            self.slots.narrow(channels)
            return
        channels = self._fold(channels)
        for bucket, members in zip(self.buckets, self.members, strict=True):
            bucket.narrow(channels.index_select(0, members))

    def crop(self, num_tokens: int) -> None:
        """Take the last tokens back; see `Slots.crop`."""
        for bucket in self.buckets:
            bucket.crop(num_tokens)

    def take(self, index: Tensor) -> None:
        """Let sequence i be sequence `index[i]`. Of several blocks, `index` is read by the host."""
        if self.members is None:
            self.buckets = (self.slots.take(index),)
            self.batch_size = len(index)
            return
        lists = [i * self.num_lists + j for i in index.tolist() for j in range(self.num_lists)]
        place = {
            which: (b, row)
            for b, members in enumerate(self.members)
            for row, which in enumerate(members.tolist())
        }
        buckets, groups = [], []
        for b, bucket in enumerate(self.buckets):
            new = [(i, place[which][1]) for i, which in enumerate(lists) if place[which][0] == b]
            if new:
                ids, rows = zip(*new, strict=True)
                buckets.append(bucket.take(torch.tensor(rows)))
                groups.append(torch.tensor(ids, device=self.members[b].device))
        self.buckets, self.members = tuple(buckets), tuple(groups)
        self.batch_size = len(index)


def select_slots(
    layers: Sequence[Slots], selections: Sequence[Selection], *, split: bool = True
) -> list[LayerSlots]:
    """Copy the keys that stay into fresh memory of exactly that size.

    Lists that differ much in length go into buckets: those of a bucket are at most 1.25 times
    (`BUCKET_WASTE`) as long as its shortest, so a layer takes at most 1.25 times the memory of its
    kept tokens. Layers without such lists share one launch per length.

    Args:
        layers: one block per layer, its slots in the conversation's order.
        selections: one per layer; a layer of which `keeps_all` is returned as it is.
        split: False = one block per layer whatever its lists, padded to the longest.
    """
    groups = _bucket_all(selections) if split else [None] * len(layers)
    padded = [i for i, group in enumerate(groups) if group is None]
    keys, values = compact_layers(
        [layers[i].keys for i in padded],
        [layers[i].values for i in padded],
        [selections[i] for i in padded],
    )
    blocks = dict(zip(padded, zip(keys, values, strict=True), strict=True))
    chosen = []
    for i, (old, selection, lists) in enumerate(zip(layers, selections, groups, strict=True)):
        if selection.keeps_all:
            chosen.append(LayerSlots.of(old))
        elif lists is None:
            chosen.append(LayerSlots.of(_selected(old, selection, *blocks[i])))
        else:
            chosen.append(_split(old, selection, lists))
    return chosen


def _bucket_all(selections: Sequence[Selection]) -> list[list[list[int]] | None]:
    """Return the lists of every bucket, per layer; None = one block. Synchronizes, once."""
    ragged = [s for s in selections if s.ragged and not s.keeps_all]
    lens = torch.cat([s.kept_lens.flatten() for s in ragged]).tolist() if ragged else []
    groups: list[list[list[int]] | None] = []
    for selection in selections:
        own: list[int] = []
        if selection.ragged and not selection.keeps_all:
            count = selection.kept_lens.numel()
            own, lens = lens[:count], lens[count:]
        is_wasteful = own and max(own) * len(own) > BUCKET_WASTE * sum(own)
        groups.append(bucket_lists(own) if is_wasteful else None)
    return groups


def bucket_lists(lens: Sequence[int]) -> list[list[int]]:
    """Group lists so that none is longer than `BUCKET_WASTE` times another of its group.

    Args:
        lens: how long each list is.

    Returns:
        The lists of every group, ascending; the group of the longest first.
    """
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lens)), key=lambda i: (-lens[i], i)):
        if not groups or longest > BUCKET_WASTE * lens[i]:
            groups.append([])
            longest = lens[i]
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def _selected(old: Slots, selection: Selection, keys: Tensor, values: Tensor) -> Slots:
    """Return the block of the kept `keys` and `values`."""
    new = Slots(
        keys,
        values,
        _selected_rows(old._tags, selection),
        seen_len=old.seen_len,
        padding_lens=old.padding_lens,
        has_empty=selection.ragged,
    )
    if "score" in old._numbers:
        new.track(_selected_rows(old._numbers["score"], selection)[..., 0])
    weights = _selected_weights(old, selection)
    if weights is not None:
        new.weigh(weights)
    return new


def _selected_weights(old: Slots, selection: Selection) -> Tensor | None:
    """Return the weights of the kept keys [batch_size, num_lists, k], None = one each."""
    if selection.key_weight is not None:
        return selection.key_weight
    weights = old._numbers.get("weight")
    return None if weights is None else _selected_rows(weights, selection)[..., 0]


def _selected_rows(rows: Tensor, selection: Selection) -> Tensor:
    """Return what is kept of [batch_size, num_lists, stored, *], -1 behind kept_lens."""
    index = selection.kept_indices.long()[..., None]
    lists = rows.expand(-1, index.shape[1], -1, -1)
    kept = lists.gather(2, index.clamp(min=0).expand(-1, -1, -1, rows.shape[3]))
    return kept.masked_fill(index < 0, -1)


def _split(old: Slots, selection: Selection, groups: Sequence[Sequence[int]]) -> LayerSlots:
    """Return a layer of several blocks."""
    batch_size, num_lists = selection.kept_lens.shape
    indices = selection.kept_indices.flatten(0, 1)
    tags = _selected_rows(old._tags, selection).flatten(0, 1)[:, None]
    weights = _selected_weights(old, selection)
    padding = old.padding_lens.repeat_interleave(num_lists, 0)
    buckets, members = [], []
    for group in groups:
        ids = torch.tensor(group, device=indices.device)
        lens = selection.kept_lens.flatten().index_select(0, ids)[:, None, None]
        k = int(lens.max())
        # Every list is a layer of its own to the op: it reads the kept rows where they are.
        keys, values = (
            [_list_of(tensor, which, num_lists) for which in group]
            for tensor in (old.keys, old.values)
        )
        own = indices.index_select(0, ids)[:, None, None, :k].contiguous()
        new_keys, new_values = ops.gather_kv(keys, values, own, lens)
        bucket = Slots(
            torch.cat(new_keys),
            torch.cat(new_values),
            tags.index_select(0, ids)[:, :, :k].contiguous(),
            seen_len=old.seen_len,
            padding_lens=padding.index_select(0, ids),
            has_empty=True,
        )
        if weights is not None:
            bucket.weigh(weights.flatten(0, 1)[:, None].index_select(0, ids)[:, :, :k])
        buckets.append(bucket)
        members.append(ids)
    return LayerSlots(buckets, members, batch_size=batch_size, num_lists=num_lists)


def _list_of(tensor: Tensor, which: int, num_lists: int) -> Tensor:
    """Return list `which` of [batch_size, num_kv_heads, ...] as [1, heads of a list, ...]."""
    sequence, head = divmod(which, num_lists)
    if num_lists == 1:
        return tensor[sequence : sequence + 1]
    return tensor[sequence : sequence + 1, head : head + 1]
