"""What an eviction kept, and what a cache holds: tokens per layer, head and modality, and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvevict.channels import PackedSlots
from kvevict.integrations.transformers.layer import EvictedLayer
from kvevict.slots import COLUMN, MODALITY, LayerSlots

MODALITY_NAMES = ("text", "image", "video", "audio")
"""Names of the codes of `kvevict.policies.Prompt.modality`."""


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """What stayed in one layer.

    Attributes:
        layer_idx: the layer's index in the model and in the cache.
        kept_indices: [batch_size, 1 | num_kv_heads, k] int32, columns of the (padded)
            conversation, ascending, -1 beyond kept_lens; one list for all heads or one per KV head.
        kept_lens: [batch_size, 1 | num_kv_heads] int32.
        kept_channels: [batch_size, num_kv_heads, num_channels] int32, ascending, what the older of
            these keys have; None = every channel.
    """

    layer_idx: int
    kept_indices: Tensor
    kept_lens: Tensor
    kept_channels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EvictionReport:
    """What one eviction of a prompt did.

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


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What one layer of a cache holds now; tensors are on the CPU.

    Attributes:
        layer_idx: the layer's index in the cache.
        kept_lens: [batch_size, num_kv_heads] int64, the real tokens of every head. Padding counts
            in a layer that was never evicted: nothing tells it from tokens.
        num_by_modality: [batch_size, num_kv_heads, 4] int64, the same by the codes of
            `kvevict.policies.Prompt`; None for a layer that was never evicted.
        bytes_stored: bytes of the storages of keys and values, slack included.
        bytes_bookkeeping: bytes of what is kept beside them: what slots hold, scores, weights,
            channels.
        bytes_full: bytes of keys and values without eviction.
    """

    layer_idx: int
    kept_lens: Tensor
    num_by_modality: Tensor | None
    bytes_stored: int
    bytes_bookkeeping: int
    bytes_full: int


@dataclass(frozen=True, eq=False)
class CacheReport:
    """What a cache holds now; print it for a table.

    Attributes:
        layers: those that hold keys and values.
        seen_len: columns of the conversation so far, padding included.
    """

    layers: tuple[LayerReport, ...]
    seen_len: int

    @property
    def bytes_stored(self) -> int:
        """Bytes of the storages of keys and values, slack included."""
        return sum(layer.bytes_stored for layer in self.layers)

    @property
    def bytes_bookkeeping(self) -> int:
        """Bytes of what is kept beside them."""
        return sum(layer.bytes_bookkeeping for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values without eviction."""
        return sum(layer.bytes_full for layer in self.layers)

    def __str__(self) -> str:
        """Return a table: a row per layer, tokens as the mean over sequences and heads."""
        used = _used_modalities(self.layers)
        names = [MODALITY_NAMES[code] for code in used]
        table = [["layer", "tokens", "least-most", *names, "stored", "of full"]]
        for layer in self.layers:
            lens = layer.kept_lens.double()
            counts = layer.num_by_modality
            span = f"{int(lens.min())}-{int(lens.max())}" if lens.numel() else "-"
            table.append(
                [
                    str(layer.layer_idx),
                    _mean(lens),
                    span,
                    *("-" if counts is None else _mean(counts[..., code]) for code in used),
                    _mib(layer.bytes_stored),
                    _share(layer.bytes_stored, layer.bytes_full),
                ]
            )
        total = ["all", "", "", *("" for _ in used), _mib(self.bytes_stored)]
        table.append([*total, _share(self.bytes_stored, self.bytes_full)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        title = f"{self.seen_len} columns seen; full cache {_mib(self.bytes_full)}, bookkeeping "
        return "\n".join([title + _mib(self.bytes_bookkeeping), *lines])


def report(cache: Cache) -> CacheReport:
    """Report what a cache holds: tokens per layer, head and modality, and real bytes.

    Args:
        cache: the `past_key_values` of a model, evicted or not.

    Returns:
        A `CacheReport`; `print` shows it as a table. Reading it synchronizes with the device.

    Raises:
        ValueError: if `cache` is not a transformers cache of dynamic layers.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"kvevict.report: cache must be a transformers Cache, got {cache!r}")
    layers = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, EvictedLayer):
            if layer.is_initialized:
                layers.append(_report_evicted(i, layer.store))
        elif isinstance(layer, DynamicLayer) and layer.keys is not None:
            layers.append(_report_full(i, layer))
        elif hasattr(layer, "keys") and not isinstance(layer, DynamicLayer):
            raise ValueError(
                f"kvevict.report: cache must have dynamic layers, got a {type(layer).__name__}"
            )
    return CacheReport(tuple(layers), cache.get_seq_length())


def _report_evicted(layer_idx: int, store: LayerSlots) -> LayerReport:
    tags = store.tags()
    heads = store.buckets[0].keys.shape[1] * (1 if store.members is None else store.num_lists)
    modality = tags[..., MODALITY].where(tags[..., COLUMN] >= 0, -1)
    counts = torch.stack([(modality == code).sum(-1) for code in range(len(MODALITY_NAMES))], -1)
    counts = counts.expand(-1, heads, -1).cpu()
    row_bytes = sum(
        t.shape[-1] * t.element_size() for t in (store.buckets[0].keys, store.buckets[0].values)
    )
    return LayerReport(
        layer_idx,
        counts.sum(-1),
        counts,
        store.num_bytes,
        store.num_bookkeeping_bytes,
        store.batch_size * heads * store.seen_len * row_bytes,
    )


def _report_full(layer_idx: int, layer: Any) -> LayerReport:
    stored = sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
    lens = torch.full(layer.keys.shape[:2], layer.keys.shape[2])
    full = count_bytes([layer.keys, layer.values])
    if isinstance(layer, DynamicSlidingWindowLayer):
        full = stored
    return LayerReport(layer_idx, lens, None, stored, 0, full)


def kept_of(layer_idx: int, store: LayerSlots) -> KeptLayer:
    """Return the report of one layer: columns of the conversation, ascending."""
    columns = store.tags()[..., COLUMN]
    last = torch.iinfo(columns.dtype).max
    kept_lens = (columns >= 0).sum(-1, dtype=torch.int32)
    ascending = columns.where(columns >= 0, last).sort(-1).values
    channels = store.channels if isinstance(store, PackedSlots) else None
    return KeptLayer(layer_idx, ascending.where(ascending < last, -1), kept_lens, channels)


def modality_by_column(stores: Sequence[LayerSlots]) -> Tensor:
    """Return the modality of every column that some layer holds [batch_size, seen_len], else -1."""
    seen_len = stores[0].seen_len
    found = torch.full(
        (stores[0].batch_size, seen_len + 1),
        -1,
        dtype=torch.int8,
        device=stores[0].buckets[0].keys.device,
    )
    for store in stores:
        tags = store.tags().flatten(1, 2)
        column = tags[..., COLUMN].where(tags[..., COLUMN] >= 0, seen_len).long()
        found.scatter_(1, column, tags[..., MODALITY].to(torch.int8))
    return found[:, :seen_len]


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _used_modalities(layers: Sequence[LayerReport]) -> list[int]:
    totals = [x.num_by_modality.sum((0, 1)) for x in layers if x.num_by_modality is not None]
    total = sum(totals, torch.zeros(len(MODALITY_NAMES), dtype=torch.int64))
    return [code for code, count in enumerate(total.tolist()) if count]


def _mean(values: Tensor) -> str:
    mean = float(values.double().mean()) if values.numel() else 0.0
    return f"{mean:.0f}" if mean == int(mean) else f"{mean:.1f}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
