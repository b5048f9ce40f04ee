"""What merging policies make of the keys that stay, by loops over Python lists in float64.

Written from the formulas, as `oracles.py` is; one sequence without padding at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.policies.oracles import Kept, Sequence, lightkv_clusters, zsmerge_parts

Groups = dict[int, list[int]]
"""The keys that are merged into each kept one, itself not among them."""


@dataclass(eq=False)
class Stored:
    """A layer after merging; of keys that are not kept, nothing is said.

    keys, values: [num_kv_heads, length, head_dim] float64.
    weights: [num_kv_heads, length] float64, how many tokens a key counts for in attention.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, s: Sequence, layer: int) -> Stored:
        key, value = s.keys[layer].double(), s.values[layer].double()
        return cls(key.clone(), value.clone(), torch.ones(key.shape[:2], dtype=torch.float64))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm() + 1e-8))


def dot(a: Tensor, b: Tensor) -> float:
    return float(a @ b)


def nearest(
    key: Tensor, kept: list[int], similar: Callable[[Tensor, Tensor], float] = cosine
) -> tuple[Groups, dict[int, float]]:
    """Give every evicted key to its most similar kept one, the first among equals."""
    groups: Groups = {}
    best: dict[int, float] = {}
    for j in range(len(key)):
        if j in kept or not kept:
            continue
        similarities = [similar(key[j].double(), key[c].double()) for c in kept]
        most = max(range(len(kept)), key=lambda i: (similarities[i], -i))
        groups.setdefault(kept[most], []).append(j)
        best[j] = similarities[most]
    return groups, best


def lightkv_cache(policy: Any, s: Sequence, layer: int, kept: list[list[int]]) -> Stored:
    stored = Stored.of(s, layer)
    weight, clusters = lightkv_clusters(policy, s, layer)
    for c, members in clusters.items():
        if c in kept[0] and members:
            group = [c, *members]
            w = torch.tensor([weight[j] for j in group], dtype=torch.float64)[:, None]
            for x, states in ((stored.keys, s.keys), (stored.values, s.values)):
                x[:, c] = (w * states[layer][:, group].double()).sum(1) / w.sum()
    return stored


def look_m(policy: Any, s: Sequence, layer: int, kept: list[list[int]]) -> Stored:
    stored = Stored.of(s, layer)
    for head, own in enumerate(kept):
        groups, best = nearest(s.keys[layer][head], own)
        for x, states in ((stored.keys, s.keys), (stored.values, s.values)):
            old = states[layer][head].double()
            for c, members in groups.items():
                if policy.merging == "pivot":
                    parts = [old[c], *((old[e] + old[c]) / 2 for e in members)]
                elif policy.merging == "average":
                    parts = [old[c], *(old[e] for e in members)]
                else:
                    parts = [old[c], *(best[e] * old[e] for e in members)]
                x[head, c] = torch.stack(parts).mean(0)
    return stored


def d2o(policy: Any, s: Sequence, layer: int, kept: list[list[int]]) -> Stored:
    stored = Stored.of(s, layer)
    for head, own in enumerate(kept):
        groups, best = nearest(s.keys[layer][head], own)
        threshold = sum(best.values()) / max(len(best), 1)
        for x, states in ((stored.keys, s.keys), (stored.values, s.values)):
            old = states[layer][head].double()
            for c, members in groups.items():
                merged = [e for e in members if best[e] >= threshold - 1e-12]
                if policy.merging == "released":
                    x[head, c] += sum(best[e] * old[e] for e in merged)
                    x[head, c] /= len(merged) + 1
                else:
                    weights = [math.e, *(math.exp(best[e]) for e in merged)]
                    rows = zip(weights, [c, *merged], strict=True)
                    x[head, c] = sum(w * old[j] for w, j in rows) / sum(weights)
    return stored


def zsmerge(policy: Any, s: Sequence, layer: int, kept: list[list[int]]) -> Stored:
    stored = Stored.of(s, layer)
    _, residual = zsmerge_parts(policy, s, layer)
    for head, groups in enumerate(residual):
        for group in groups:
            stored.keys[head, group[0]] = s.keys[layer][head, group].double().mean(0)
            stored.values[head, group[0]] = s.values[layer][head, group].double().mean(0)
            stored.weights[head, group[0]] = len(group)
    return stored


def keepkv(policy: Any, s: Sequence, layer: int, kept: list[list[int]]) -> Stored:
    stored = Stored.of(s, layer)
    group_size = len(s.queries[layer]) // len(s.keys[layer])
    rows = range(max(s.length - policy.window, 0), s.length)
    parts = torch.tensor([policy.decay ** (s.length - 1 - i) for i in rows], dtype=torch.float64)
    for head, own in enumerate(kept):
        key, value = stored.keys[head].clone(), stored.values[head].clone()
        queries = s.queries[layer][head * group_size : (head + 1) * group_size, rows].double()
        query = (queries.mean(0) * parts[:, None]).sum(0) / parts.sum() / key.shape[1] ** 0.5
        groups, best = nearest(s.keys[layer][head], own)
        for c, members in groups.items():
            group = [c, *(e for e in members if best[e] >= policy.similarity)]
            if len(group) == 1:
                continue
            logits = key[group] @ query
            e = logits.exp()
            mean = (e[:, None] * key[group]).sum(0) / e.sum()
            stored.values[head, c] = (e[:, None] * value[group]).sum(0) / e.sum()
            factor = float((e.sum() / len(group)).log() / (e * logits).sum()) * float(e.sum())
            if 0.5 <= factor <= 2:
                stored.keys[head, c] = factor * mean
                stored.weights[head, c] = len(group)
            else:
                stored.keys[head, c] = mean
                stored.weights[head, c] = e.sum() / (query @ mean).exp()
    return stored


MERGES: dict[str, Callable[[Any, Sequence, int, list[list[int]]], Stored]] = {
    "d2o": d2o,
    "keepkv": keepkv,
    "lightkv_cache": lightkv_cache,
    "look_m": look_m,
    "zsmerge": zsmerge,
}


def merge_by_oracle(name: str, policy: Any, s: Sequence, kept: Kept) -> list[Stored]:
    """Return what every layer stores, given the keys that stay."""
    stored = []
    for layer, lists in enumerate(kept):
        num_heads = len(s.keys[layer])
        lists = lists * (num_heads // len(lists))
        if name not in MERGES or len(lists[0]) == s.length:
            stored.append(Stored.of(s, layer))
        else:
            stored.append(MERGES[name](policy, s, layer, lists))
    return stored
