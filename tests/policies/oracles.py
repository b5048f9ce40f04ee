"""What every policy keeps, from materialized attention in float64 and sorted Python lists.

Written from the formulas alone: nothing of kvevict computes here. One sequence without padding at a
time; an oracle returns the kept positions of every layer and list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Kept = list[list[list[int]]]


@dataclass(frozen=True)
class Sequence:
    """One sequence.

    row: a letter per token, as `make_prompt` reads it.
    queries, keys, values: one [num_heads, length, head_dim] per layer.
    """

    row: str
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return len(self.row)

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def vision(self) -> list[int]:
        return [j for j, letter in enumerate(self.row) if letter in "iv"]

    @property
    def trailing_text(self) -> list[int]:
        after = self.vision[-1] if self.vision else self.length
        return [j for j in range(after + 1, self.length) if self.row[j] == "t"]

    @cached_property
    def attention(self) -> list[Tensor]:
        """[num_qo_heads, length, length] per layer."""
        return [attend(q, k) for q, k in zip(self.queries, self.keys, strict=True)]

    def of_groups(self, votes: Tensor) -> Tensor:
        """Average [num_qo_heads, ...] over the query heads of every KV head."""
        return votes.unflatten(0, (len(self.keys[0]), -1)).mean(1)


def attend(query: Tensor, key: Tensor) -> Tensor:
    """Return causal attention [num_qo_heads, length, length] in float64."""
    return attention_logits(query, key).softmax(-1)


def attention_logits(query: Tensor, key: Tensor) -> Tensor:
    """Return logits, -inf for the future."""
    repeated = key.double().repeat_interleave(len(query) // len(key), 0)
    logits = query.double() @ repeated.mT / query.shape[-1] ** 0.5
    future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf)


def tokens_of(keep: float | int | None, length: int) -> int:
    """Return `keep` as a number of tokens."""
    if keep is None:
        return length
    tokens = keep if isinstance(keep, int) else math.floor(keep * length + 1e-6)
    return min(max(tokens, 1), length)


def forced_of(policy: Any, length: int, budget: int, num_recent: int) -> set[int]:
    """Return newest keys, at most the newer half of the budget, and the sinks that then fit."""
    recent = min(num_recent, (budget + 1) // 2)
    sinks = min(policy.num_sink, budget - recent)
    return {*range(min(sinks, length)), *range(max(length - recent, 0), length)}


def best(candidates: Iterable[int], scores: Tensor, count: int) -> list[int]:
    """Return the candidates with the highest scores, the lowest position first among equals."""
    return sorted(candidates, key=lambda j: (-float(scores[j]), j))[: max(count, 0)]


def choose(length: int, forced: set[int], scores: Tensor, budget: int) -> list[int]:
    """Return the forced keys and the best others."""
    others = [j for j in range(length) if j not in forced]
    return sorted([*forced, *best(others, scores, budget - len(forced))])


def share(masses: list[float], policy: Any, length: int) -> list[float]:
    """Return L * keep * mass / sum, with water filling where the policy wants it."""
    ratio = policy.keep if isinstance(policy.keep, float) else min(policy.keep / length, 1.0)
    total = ratio * len(masses)
    fractions = [total * m / sum(masses) for m in masses]
    while policy.redistribute and max(fractions) > 1 + 1e-12:
        full = [f >= 1 - 1e-12 for f in fractions]
        rest = sum(m for m, is_full in zip(masses, full, strict=True) if not is_full)
        left = max(total - sum(full), 0)
        fractions = [
            1.0 if is_full else left * m / rest for m, is_full in zip(masses, full, strict=True)
        ]
    return fractions


# Methods


def streaming_llm(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    sinks = min(policy.num_sink, budget // 2)
    return [[[*range(sinks), *range(s.length - budget + sinks, s.length)]]] * s.num_layers


def random(policy: Any, s: Sequence) -> Kept:
    def scramble(word: int) -> int:
        word &= 0xFFFFFFFF
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            word = (word ^ word >> shift) * factor % 2**32
        return word ^ word >> 15

    budget = tokens_of(policy.keep, s.length)
    forced = set(range(min(policy.num_sink, budget)))
    kept = []
    for layer in range(s.num_layers if policy.per_head else 1):
        lists = []
        for head in range(len(s.keys[0]) if policy.per_head else 1):
            start = scramble(scramble(scramble(policy.seed) + layer) + head)
            scores = torch.tensor([scramble(start + j) >> 8 for j in range(s.length)])
            lists.append(choose(s.length, forced, scores, budget))
        kept.append(lists)
    return kept if policy.per_head else kept * s.num_layers


def tova(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    forced = forced_of(policy, s.length, budget, 1)
    return [[choose(s.length, forced, a.mean(0)[-1], budget)] for a in s.attention]


def h2o(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    recent = math.floor(budget * policy.recent_share + 1e-6)
    sinks = min(policy.num_sink, budget - recent)
    forced = {*range(sinks), *range(s.length - recent, s.length)}
    kept = []
    for attention in s.attention:
        scores = s.of_groups(attention.sum(1))
        if policy.normalize:
            scores = scores / torch.arange(s.length, 0, -1)
        kept.append([choose(s.length, forced, row, budget) for row in scores])
    return kept


def lightkv_cache(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    sinks = list(range(min(policy.num_sink, budget)))
    kept = []
    for layer in range(s.num_layers):
        weight, clusters = lightkv_clusters(policy, s, layer)
        dead = {j for members in clusters.values() for j in members}
        others = [j for j in range(s.length) if j not in sinks]
        scores = {
            j: -1.0 if j in dead else sum(weight[i] for i in [j, *clusters.get(j, [])])
            for j in others
        }
        others.sort(key=lambda j: (j in s.vision, -scores[j], j))
        kept.append([sorted([*sinks, *others[: budget - len(sinks)]])])
    return kept


def lightkv_clusters(
    policy: Any, s: Sequence, layer: int
) -> tuple[list[float], dict[int, list[int]]]:
    """Return omega of every key, and for keys that are merged into the keys that go there."""
    rows = s.trailing_text or list(range(s.length))
    weight = s.attention[layer].mean(0)[rows].sum(0).tolist()
    tokens = s.keys[layer].double().transpose(0, 1).flatten(1)
    vision = [j for j in s.vision if j >= policy.num_sink]
    excess = len(vision) - (tokens_of(policy.keep, s.length) - (s.length - len(vision)))
    clusters = {j: [j] for j in vision}
    alive = list(range(s.length))

    def mean(j: int) -> Tensor:
        w = torch.tensor([weight[i] for i in clusters[j]], dtype=torch.float64)[:, None]
        return (w * tokens[clusters[j]]).sum(0) / w.sum()

    for window in policy.windows:
        images: list[list[int]] = []
        letters = [s.row[j] if j in clusters else "t" for j in alive]
        for n, j in enumerate(alive):
            if letters[n] == "t":
                continue
            if n == 0 or letters[n] != letters[n - 1]:
                images.append([])
            images[-1].append(j)
        if any(len(image) < 8 * window**2 for image in images):
            continue
        pairs = []
        for image in images:
            for members in windows_of(image, window):
                for a in members[::2]:
                    cosines = [
                        float(torch.cosine_similarity(mean(a), mean(b), 0)) for b in members[1::2]
                    ]
                    if cosines:
                        best = max(range(len(cosines)), key=lambda i: (cosines[i], -i))
                        pairs.append((-cosines[best], a, members[1::2][best]))
        for _, a, b in sorted(pairs)[: max(excess, 0)]:
            clusters[b] = clusters[b] + clusters.pop(a)
            alive.remove(a)
            excess -= 1
    return weight, {j: own[1:] for j, own in clusters.items()}


def windows_of(image: list[int], window: int) -> list[list[int]]:
    """Return the members of each window of an image."""
    side = math.isqrt(len(image))
    side += side**2 < len(image)
    short, rest = divmod(side, window)
    part = [i for i in range(window) for _ in range(short + (i < rest))]
    found: dict[tuple[int, int], list[int]] = {}
    for t, j in enumerate(image):
        found.setdefault((part[t // side], part[t % side]), []).append(j)
    return list(found.values())


def look_m(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    recent = math.floor(budget * policy.recent_share + 1e-6)
    forced = forced_of(policy, s.length, budget, recent)
    others = [j for j in range(s.length) if j not in forced]
    kept = []
    for attention in s.attention:
        lists = []
        for row in s.of_groups(attention.sum(1)):
            order = sorted(others, key=lambda j: (j in s.vision, -float(row[j]), j))
            lists.append(sorted([*forced, *order[: budget - len(forced)]]))
        kept.append(lists)
    return kept


def zsmerge(policy: Any, s: Sequence) -> Kept:
    kept = []
    for own, residual in (zsmerge_parts(policy, s, layer) for layer in range(s.num_layers)):
        firsts = [[group[0] for group in groups] for groups in residual]
        kept.append([sorted([*a, *b]) for a, b in zip(own, firsts, strict=True)])
    return kept


def zsmerge_parts(
    policy: Any, s: Sequence, layer: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return for every head the keys that stay for themselves, and the groups of the others."""
    budget = tokens_of(policy.keep, s.length)
    num_residual = min(policy.num_residual, budget // 2)
    tail = max(2, math.floor(budget * policy.tail_share + 1e-6))
    forced = forced_of(policy, s.length, budget - num_residual, tail)
    decay = policy.decay ** torch.arange(s.length - 1, -1, -1)
    kept, residual = [], []
    for row in s.of_groups((s.attention[layer] * decay[:, None]).sum(1)):
        kept.append(choose(s.length, forced, row, budget - num_residual))
        left = [j for j in range(s.length) if j not in kept[-1]]
        sizes = [
            len(left) // num_residual + (i < len(left) % num_residual) for i in range(num_residual)
        ]
        residual.append([[left.pop(0) for _ in range(size)] for size in sizes])
    return kept, residual


def keepkv(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    forced = forced_of(policy, s.length, budget, policy.window)
    part = policy.decay ** torch.arange(s.length - 1, -1, -1)
    part[: max(s.length - policy.window, 0)] = 0
    return [
        [
            choose(s.length, forced, row, budget)
            for row in s.of_groups((attention * part[:, None]).sum(1))
        ]
        for attention in s.attention
    ]


def snap_forced(policy: Any, s: Sequence) -> set[int]:
    return forced_of(policy, s.length, tokens_of(policy.keep, s.length), policy.window)


def snap_scores(policy: Any, s: Sequence, layer: int) -> Tensor:
    """Return the pooled scores [num_kv_heads, length]."""
    votes = s.of_groups(s.attention[layer][:, -policy.window :].sum(1))
    others = [j for j in range(s.length) if j not in snap_forced(policy, s)]
    pooled = votes.clone()
    for j in others:
        near = [i for i in others if abs(i - j) <= policy.pool_kernel // 2]
        pooled[:, j] = votes[:, near].sum(1) / policy.pool_kernel
    return pooled


def snapkv(policy: Any, s: Sequence) -> Kept:
    budget, forced = tokens_of(policy.keep, s.length), snap_forced(policy, s)
    return [
        [choose(s.length, forced, row, budget) for row in snap_scores(policy, s, layer)]
        for layer in range(s.num_layers)
    ]


def pyramid_budgets(policy: Any, s: Sequence) -> list[int]:
    budget, window = tokens_of(policy.keep, s.length), len(snap_forced(policy, s))
    includes = policy.accounting == "kvpress"
    base = budget if includes else budget - window
    low = base / policy.beta
    high = 2 * base - low
    if high > s.length - window:
        high = s.length - window
        low = 2 * base - high
    if high < low or (includes and low < window):
        return [budget] * s.num_layers
    steps = [high - i * (high - low) / (s.num_layers - 1) for i in range(s.num_layers)]
    return [round(step) + (0 if includes else window) for step in steps]


def pyramidkv(policy: Any, s: Sequence) -> Kept:
    forced = snap_forced(policy, s)
    return [
        [choose(s.length, forced, row, budget) for row in snap_scores(policy, s, layer)]
        for layer, budget in enumerate(pyramid_budgets(policy, s))
    ]


def ada_budgets(policy: Any, s: Sequence, layer: int) -> list[int]:
    budget, forced = tokens_of(policy.keep, s.length), snap_forced(policy, s)
    scores = snap_scores(policy, s, layer)
    heads = range(len(scores))
    others = [j for j in range(s.length) if j not in forced]
    num_safe = 0
    if policy.floor_rule == "kvpress":
        num_safe = math.floor(policy.floor * budget + 1e-6) - len(forced)
    safe = {(h, j) for h in heads for j in best(others, scores[h], num_safe)}
    rivals = sorted(
        ((h, j) for h in heads for j in others if (h, j) not in safe),
        key=lambda pair: (-float(scores[pair]), pair),
    )
    open_places = len(heads) * (budget - len(forced)) - len(safe)
    winners = [*safe, *rivals[:open_places]]
    counts = [sum(h == head for h, _ in winners) for head in heads]
    if policy.floor_rule == "original":
        sure = math.floor(policy.floor * (budget - len(forced)) + 1e-6)
        counts = [round(n * (1 - policy.floor) + sure) for n in counts]
    return [len(forced) + n for n in counts]


def adakv(policy: Any, s: Sequence) -> Kept:
    forced = snap_forced(policy, s)
    kept = []
    for layer in range(s.num_layers):
        scores, budgets = snap_scores(policy, s, layer), ada_budgets(policy, s, layer)
        pairs = zip(scores, budgets, strict=True)
        kept.append([choose(s.length, forced, row, budget) for row, budget in pairs])
    return kept


def chunkkv(policy: Any, s: Sequence) -> Kept:
    budget, forced = tokens_of(policy.keep, s.length), snap_forced(policy, s)
    kept = []
    for layer in range(s.num_layers):
        scores = snap_scores(policy, s, layer - layer % policy.num_reuse).sum(0)
        starts = range(0, s.length, policy.chunk_len)
        chunks = [range(i, min(i + policy.chunk_len, s.length)) for i in starts]
        opened = [[j for j in chunk if j not in forced] for chunk in chunks]
        opened = [chunk for chunk in opened if chunk]
        opened.sort(key=lambda chunk: -float(scores[chunk].mean()))
        in_order = [j for chunk in opened for j in chunk]
        kept.append([sorted([*forced, *in_order[: budget - len(forced)]])])
    return kept


def hae(policy: Any, s: Sequence) -> Kept:
    mean = s.attention[0].mean(0)
    voting = mean[s.trailing_text] if s.trailing_text else mean
    sums, maxima = voting.sum(0), voting.max(0).values
    total = float(sums[s.vision].sum())
    ratio = policy.ratio if policy.kappa is None else policy.kappa / max(len(s.vision), 1)
    low = [j for j in s.vision if sums[j] < ratio * total and maxima[j] < policy.alpha]
    most = max(len(s.vision) - 1, 0)
    if policy.max_evicted is not None:
        most = min(most, policy.max_evicted)
    pruned = sorted(low, key=lambda j: (float(sums[j]), -j))[:most]
    pruned = [j for j in pruned if j >= policy.num_sink]
    budget = min(s.length - len(pruned), tokens_of(policy.keep, s.length))
    sinks = forced_of(policy, s.length, budget, 0)
    others = [j for j in range(s.length) if j not in sinks]
    others.sort(key=lambda j: (j in s.vision, j in pruned, -float(sums[j]), j))
    return [[sorted([*sinks, *others[: budget - len(sinks)]])]] * s.num_layers


def prefixkv(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    forced = forced_of(policy, s.length, budget, policy.num_recent)
    scores = [attention.mean(0).sum(0) for attention in s.attention]
    curves = [row.sort(descending=True).values.cumsum(0) / row.sum() for row in scores]

    def sizes(p: float) -> list[int]:
        return [min(int((c < p).sum()) + len(forced), s.length) for c in curves]

    # Bisection on p; between two values of a curve nothing changes.
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(sizes(middle)) <= budget * s.num_layers:
            low = middle
        else:
            high = middle
    pairs = zip(scores, sizes(low), strict=True)
    return [[choose(s.length, forced, row, size)] for row, size in pairs]


def vl_cache(policy: Any, s: Sequence) -> Kept:
    rows = s.trailing_text or list(range(s.length))
    scores, densities = [], []
    for query, key, attention in zip(s.queries, s.keys, s.attention, strict=True):
        scores.append(attention.mean(0)[rows].sum(0))
        seen = attention_logits(query, key)[:, rows] > -torch.inf
        entries = attention[:, rows]
        used = (entries >= policy.threshold * entries.amax(-1, keepdim=True)) & seen
        densities.append(float(used.sum() / seen.sum()))
    kept = []
    for row, fraction in zip(scores, share(densities, policy, s.length), strict=True):
        budget = max(1, math.floor(min(max(fraction, 0.01), 1.0) * s.length + 1e-6))
        recent = max(1, math.floor(policy.recent_share * budget + 1e-6))
        kept.append([choose(s.length, forced_of(policy, s.length, budget, recent), row, budget)])
    return kept


def grounded(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    half = (budget + 1) // 2
    forced = forced_of(policy, s.length, half, 1)
    anchors = [j for j in range(s.length) if j not in s.vision or j in forced]
    others = [j for j in range(s.length) if j not in anchors]
    count = min(len(anchors), max(half, budget - len(others)))
    rows = s.trailing_text or list(range(s.length))
    kept, ranked, pool = [], [], []
    for i, attention in enumerate(s.attention):
        scores = attention[:, rows].amax(1).sqrt().mean(0) ** 2
        text = [j for j in anchors if j not in forced]
        kept.append([*forced, *best(text, scores, count - len(forced))])
        ranked.append(best(others, scores, len(others)))
        total = float(scores[others].sum())
        covered = 0.0
        for place, j in enumerate(ranked[i]):
            worth = float(scores[j]) * math.sqrt(max(0.0, 1 - covered / total))
            pool.append((-worth, i, place))
            covered += float(scores[j])
    for _, i, place in sorted(pool)[: s.num_layers * (budget - count)]:
        kept[i].append(ranked[i][place])
    return [[sorted(layer)] for layer in kept]


def corm(policy: Any, s: Sequence) -> Kept:
    limit = tokens_of(policy.keep, s.length)
    if policy.keep is None:
        recent = range(max(s.length - policy.num_recent, 0), s.length)
        forced = {*range(min(policy.num_sink, s.length)), *recent}
    else:
        forced = forced_of(policy, s.length, limit, policy.num_recent)
    num_seen = torch.arange(1, s.length + 1)[:, None]
    kept = []
    for attention in s.attention:
        relative = (attention * num_seen)[:, -policy.window :].amax(1)
        scores = relative.unflatten(0, (len(s.keys[0]), -1)).amax(1)
        counts = [len(forced | {j for j in range(s.length) if row[j] >= 1}) for row in scores]
        pairs = zip(scores, counts, strict=True)
        kept.append([choose(s.length, forced, row, min(n, limit)) for row, n in pairs])
    return kept


def d2o_budgets(policy: Any, s: Sequence) -> list[int]:
    budget = tokens_of(policy.keep, s.length)
    whole = {0, 1, s.num_layers - 1} & {*range(s.num_layers)}
    others = [i for i in range(s.num_layers) if i not in whole]
    if not others:
        return [budget] * s.num_layers
    total = budget * s.num_layers
    of_whole = min(s.length, max(total // 2 // len(whole), 1))
    parts = {}
    for i in others:
        variance = s.attention[i].sum(1).var(1)
        low, high = variance.min(), variance.max()
        parts[i] = math.exp(-float(((variance - low) / (high - low + 1e-6)).mean()))
    left, open_layers, sizes = total - len(whole) * of_whole, dict(parts), {}
    while any(left * p / sum(open_layers.values()) > s.length for p in open_layers.values()):
        unit = left / sum(open_layers.values())
        full = [i for i, p in open_layers.items() if unit * p > s.length]
        for i in full:
            sizes[i] = s.length
            left -= s.length
            del open_layers[i]
    for i, p in open_layers.items():
        sizes[i] = max(1, math.floor(left * p / sum(open_layers.values()) + 1e-6))
    return [of_whole if i in whole else sizes[i] for i in range(s.num_layers)]


def d2o(policy: Any, s: Sequence) -> Kept:
    kept = []
    for attention, budget in zip(s.attention, d2o_budgets(policy, s), strict=True):
        recent = math.floor(budget * policy.recent_share + 1e-6)
        forced = forced_of(policy, s.length, budget, recent)
        kept.append(
            [choose(s.length, forced, row, budget) for row in s.of_groups(attention.sum(1))]
        )
    return kept


def dbudgetkv(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    forced = forced_of(policy, s.length, budget, policy.num_recent)
    others = [j for j in range(s.length) if j not in forced]
    num_full = min(policy.num_full, s.num_layers)
    sizes = []
    for layer, attention in enumerate(s.attention):
        removed = 0
        rest = attention.clone()
        for j in others if layer >= num_full else []:
            rest[:, :, j] = 0
            if float(rest.norm() / attention.norm()) < 1 - policy.tolerance:
                break
            removed += 1
        sizes.append(s.length - removed)
    if policy.keep is not None:
        total, num_other = budget * s.num_layers, s.num_layers - num_full
        full = s.length
        if num_full:
            full = min(full, (total - num_other * len(forced)) // num_full)
        other = (total - num_full * full) // max(num_other, 1)
        sizes = [min(n, full if layer < num_full else other) for layer, n in enumerate(sizes)]
    newest = torch.arange(s.length)
    return [[choose(s.length, forced, newest, size)] for size in sizes]


def flashcache(policy: Any, s: Sequence) -> Kept:
    place = torch.arange(s.length, dtype=torch.float64)
    basis = torch.cos(math.pi * (place + 0.5) * place[:, None] / s.length)
    basis = basis / basis.norm(dim=1, keepdim=True)
    above = math.floor(policy.cutoff * s.length + 1e-6)
    scores, masses = [], []
    for pair in zip(s.keys, s.values, strict=True):
        distance, energy_share = torch.zeros(s.length, dtype=torch.float64), 0.0
        for states in pair:
            coefficients = basis @ states.double()
            energy = coefficients.square().sum((0, 2))
            energy_share += float(energy[above:].sum() / energy.sum())
            rough = basis[above:].mT @ coefficients[:, above:]
            distance += rough.square().mean((0, 2))
        scores.append(distance)
        masses.append(energy_share)
    kept = []
    for row, fraction in zip(scores, share(masses, policy, s.length), strict=True):
        budget = max(1, math.floor(min(fraction, 1.0) * s.length + 1e-6))
        sinks = list(range(min(policy.num_sink, budget)))
        first = policy.text_first
        others = sorted(
            range(len(sinks), s.length),
            key=lambda j: (first and j in s.vision, -float(row[j]), j),
        )
        kept.append([sorted([*sinks, *others[: budget - len(sinks)]])])
    return kept


def tgv_kv(policy: Any, s: Sequence) -> Kept:
    everything = [[list(range(s.length))]] * s.num_layers
    if not s.vision:
        return everything
    rows = s.trailing_text
    scores, masses = [], []
    for attention in s.attention:
        mean = attention.mean(0)
        voting = mean[rows] if rows else mean
        row = voting.sum(0)
        masses.append(float(row[s.vision].sum()) if rows else 1.0)
        if policy.text_score == "released":
            row = mean.sum(0)
        if rows:
            weight = voting[:, rows].sum(0) / torch.arange(len(rows), 0, -1)
            row = row.clone()
            row[s.vision] = (weight @ voting)[s.vision]
        scores.append(row)
    kept = []
    last = range(max(policy.num_sink, s.length - policy.num_recent), s.length)
    forced = {*range(min(policy.num_sink, s.length)), *last}
    for row, fraction in zip(scores, share(masses, policy, s.length), strict=True):
        others = [j for j in range(s.length) if j not in forced]
        others.sort(key=lambda j: (j in s.vision, -float(row[j]), j))
        drop = max(0, round(s.length * (1 - fraction)))
        kept.append([sorted([*forced, *others[: max(0, len(others) - drop)]])])
    return kept


def keydiff(policy: Any, s: Sequence) -> Kept:
    budget = tokens_of(policy.keep, s.length)
    forced = set(range(min(policy.num_sink, budget)))
    return [[choose(s.length, forced, -row, budget) for row in mean_cosines(key)] for key in s.keys]


def mean_cosines(key: Tensor) -> Tensor:
    """Return the mean cosine of every key to all keys [num_kv_heads, length]."""
    unit = key.double() / key.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.mT).mean(-1)


def mixkv(policy: Any, s: Sequence) -> Kept:
    host = policy.host
    forced = snap_forced(host, s)
    others = [j for j in range(s.length) if j not in forced]
    equal = [[tokens_of(host.keep, s.length)] * len(s.keys[0])] * s.num_layers
    if hasattr(host, "beta"):
        equal = [[budget] * len(s.keys[0]) for budget in pyramid_budgets(host, s)]
    kept = []
    for layer, budgets in enumerate(equal):
        if hasattr(host, "floor"):
            budgets = ada_budgets(host, s, layer)
        attention, cosines = snap_scores(host, s, layer), mean_cosines(s.keys[layer])
        lists = []
        for head, budget in enumerate(budgets):
            scores, near = attention[head].clone(), cosines[head]
            # The mean cosine of two different keys.
            redundancy = float((near.sum() - 1) / (s.length - 1))
            redundancy = min(max(redundancy, 0.0), 1.0)
            value = s.values[layer][head].double().norm(dim=-1)[others]
            mean = scores[others].mean()
            importance = scores[others] + to_mean(value, mean)
            reference = importance.mean() if policy.diversity_reference == 1 else mean
            diversity = to_mean(-near[others], reference)
            scores[others] = redundancy * diversity + (1 - redundancy) * importance
            lists.append(choose(s.length, forced, scores, budget))
        kept.append(lists)
    return kept


def think(policy: Any, s: Sequence) -> Kept:
    host = policy.host
    return ORACLES[type(host).__module__.split(".")[-1]](host, s)


def think_channels(policy: Any, s: Sequence) -> Kept:
    """Return the channels that every layer and KV head keeps."""
    kept = []
    for query, key in zip(s.queries, s.keys, strict=True):
        of_query = s.of_groups(query[:, -policy.window :].double().square().mean(1))
        scores = of_query * key.double().square().mean(1)
        head_dim = scores.shape[1]
        count = head_dim - math.floor(head_dim * policy.ratio)
        kept.append([sorted(best(range(head_dim), own, count)) for own in scores])
    return kept


def to_mean(values: Tensor, mean: Tensor) -> Tensor:
    """Bring values to [0, 1], then to a mean."""
    if not len(values):
        return values
    unit = (values - values.min()) / (values.max() - values.min() + 1e-8)
    return unit * mean / (unit.mean() + 1e-8)


ORACLES: dict[str, Callable[[Any, Sequence], Kept]] = {
    "adakv": adakv,
    "chunkkv": chunkkv,
    "corm": corm,
    "d2o": d2o,
    "dbudgetkv": dbudgetkv,
    "flashcache": flashcache,
    "grounded": grounded,
    "h2o": h2o,
    "hae": hae,
    "keepkv": keepkv,
    "keydiff": keydiff,
    "lightkv_cache": lightkv_cache,
    "look_m": look_m,
    "mixkv": mixkv,
    "prefixkv": prefixkv,
    "pyramidkv": pyramidkv,
    "random": random,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tgv_kv": tgv_kv,
    "think": think,
    "tova": tova,
    "vl_cache": vl_cache,
    "zsmerge": zsmerge,
}


def keep_by_oracle(name: str, policy: Any, s: Sequence) -> Kept:
    """Return what a policy keeps of a sequence; all of it where that fits into `keep`."""
    keep = getattr(policy, "host", policy).keep
    if keep is not None and tokens_of(keep, s.length) >= s.length:
        return [[list(range(s.length))]] * s.num_layers
    return ORACLES[name](policy, s)
