"""Prompts, random layers and the policies that the tests of policies are generated from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvevict import policies
from kvevict.policies import LayerScores, PrefillPolicy, Prompt, Selection

NUM_QO_HEADS, NUM_KV_HEADS = 4, 2

PROMPTS = {
    "one_image": ["tttttiiiiiiiiiiiiiittttttt"],
    "two_images": ["tttiiiiiitttiiiiiiiiiitttt"],
    "video_with_separators": ["ttvvvvvtvvvvvtvvvvvvtttttt"],
    "image_and_video": ["ttiiiiiiittvvvvvtvvvvvtttt"],
    "video_and_image": ["tvvvvtvvvvtvvvvtiiiiiiittt"],
    "video_last": ["tttttiiiittttvvvvvtvvvvvvv"],
    "padded_videos": [
        "....ttvvvvtvvvvtvvvvtttt",
        "tiiiiiittvvvvvtvvvvvtttt",
        "..ttttttvvvvvtvvvvvvvvvv",
    ],
    "image_first": ["iiiiiiiiiiiiiiiiiiiitttttt"],
    "no_text": ["iiiiiiiiiiiiiiiiiiiiiiiii"],
    "no_vision": ["tttttttttttttttttttttttttt"],
    "left_padded": [
        "......tttiiiiiiiiiiittttt",
        "ttttiiiiiiittiiiiiiiiittt",
        "..tiiiiiiiiiiiiiiiiiiiiit",
    ],
    "mixed": ["tttttttttttttttttttttttt", "ttttttttiiiiiiiiiiiiiiii", "..ttttiiiiiiiiiiiitttttt"],
    "audio": ["ttaaaaaiiiiiiiiiiiitaatt"],
}

# At least one case per name of the registry; a test sees to that.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "adakv": [
        {"keep": 0.4, "window": 4},
        {"keep": 11, "window": 3, "num_sink": 1, "floor": 0.5, "pool_kernel": 1},
        {"keep": 0.5, "window": 2, "num_sink": 0, "floor_rule": "original"},
    ],
    "chunkkv": [
        {"keep": 0.4, "window": 4, "chunk_len": 3},
        {"keep": 13, "window": 3, "num_sink": 1, "pool_kernel": 1, "chunk_len": 4, "num_reuse": 2},
    ],
    "corm": [
        {"window": 4, "num_recent": 5},
        {"keep": 0.4, "window": 3, "num_recent": 2, "num_sink": 2},
    ],
    "d2o": [
        {"keep": 0.4},
        {"keep": 7, "num_sink": 1, "recent_share": 0.5, "merging": "exponential"},
        {"keep": 0.6, "num_sink": 0},
    ],
    "dbudgetkv": [
        {"num_full": 1, "tolerance": 0.05, "num_sink": 2},
        {"keep": 0.5, "num_full": 1, "num_recent": 2, "tolerance": 0.2},
        {"keep": 0.3, "num_full": 2},
    ],
    "flashcache": [
        {"keep": 0.4},
        {"keep": 9, "cutoff": 0.3, "num_sink": 1, "text_first": False, "redistribute": True},
    ],
    "grounded": [{"keep": 0.4}, {"keep": 7}, {"keep": 11, "num_sink": 4}],
    "h2o": [
        {"keep": 0.4},
        {"keep": 5},
        {"keep": 10, "num_sink": 0, "recent_share": 0.0, "normalize": True},
    ],
    "hae": [
        {"kappa": 0.9, "alpha": 0.3},
        {"ratio": 0.2, "alpha": 0.6, "num_sink": 1, "max_evicted": 4},
        {"kappa": 1.2, "alpha": 1.0, "keep": 0.4},
    ],
    "keepkv": [
        {"keep": 0.4, "window": 4, "similarity": 0.3},
        {"keep": 7, "window": 1, "num_sink": 1, "similarity": -1.0},
        {"keep": 0.5, "window": 32, "decay": 0.5, "similarity": 0.0},
    ],
    "keydiff": [{"keep": 0.4}, {"keep": 7, "num_sink": 0}],
    "lightkv_cache": [
        {"keep": 0.4, "windows": (1, 1)},
        {"keep": 13, "num_sink": 1, "windows": (1,)},
        {"keep": 0.7, "windows": (4, 2, 1), "num_sink": 0},
    ],
    "look_m": [
        {"keep": 0.4},
        {"keep": 7, "num_sink": 1, "recent_share": 0.3, "merging": "weighted"},
        {"keep": 0.5, "recent_share": 1.0, "merging": "average"},
    ],
    "mixkv": [
        {"keep": 0.4, "window": 4},
        {"keep": 11, "window": 3, "num_sink": 1, "host": "adakv", "pool_kernel": 1},
        {"keep": 0.5, "window": 3, "num_sink": 1, "host": "pyramidkv", "diversity_reference": 1},
    ],
    "prefixkv": [{"keep": 0.4}, {"keep": 9, "num_sink": 1, "num_recent": 3}],
    "pyramidkv": [
        {"keep": 0.4, "window": 4},
        {"keep": 14, "window": 3, "num_sink": 2, "beta": 5},
        {"keep": 0.5, "window": 2, "num_sink": 1, "beta": 4, "accounting": "kvpress"},
    ],
    "random": [{"keep": 0.4}, {"keep": 8, "seed": 7, "per_head": True, "num_sink": 1}],
    "snapkv": [
        {"keep": 0.4, "window": 4},
        {"keep": 11, "num_sink": 1, "window": 32, "pool_kernel": 1},
    ],
    "streaming_llm": [{"keep": 0.4}, {"keep": 5}],
    "tgv_kv": [
        {"keep": 0.4},
        {"keep": 0.4, "text_score": "released"},
        {"keep": 8, "num_sink": 2, "num_recent": 2, "redistribute": True},
    ],
    "think": [
        {"keep": 0.4},
        {"keep": 9, "host": "adakv", "ratio": 0.6, "window": 4, "num_recent": 3},
        {"keep": 0.5, "host": "tova", "ratio": 0.0},
    ],
    "tova": [{"keep": 0.4}, {"keep": 6, "num_sink": 0}],
    "vl_cache": [
        {"keep": 0.4},
        {"keep": 9, "threshold": 0.2, "recent_share": 0.3, "num_sink": 1, "redistribute": True},
    ],
    "zsmerge": [
        {"keep": 0.4},
        {"keep": 8, "num_sink": 1, "num_residual": 3, "decay": 0.7},
        {"keep": 0.5, "num_sink": 0, "num_residual": 5, "tail_share": 0.3},
    ],
}
CASES: dict[str, tuple[str, PrefillPolicy]] = {
    f"{name}-{i}": (name, policies.get(name, **fields))
    for name, variants in FIELDS.items()
    for i, fields in enumerate(variants)
}


def settings_of(policy: Any) -> Any:
    """Return what holds `keep` and `num_sink`: the policy, or its host."""
    return getattr(policy, "host", policy)


def make_prompt(*rows: str) -> Prompt:
    """Return a prompt from one letter per key: t text, i image, v video, a audio, . padding."""
    codes = {"t": 0, "i": 1, "v": 2, "a": 3, ".": 0}
    modality = torch.tensor([[codes[c] for c in row] for row in rows], dtype=torch.int8)
    key_mask = torch.tensor([[c != "." for c in row] for row in rows])
    return Prompt(modality, None if key_mask.all() else key_mask)


def make_layers(prompt: Prompt, num_layers: int = 3, qo_len: int | None = None) -> dict[str, Any]:
    """Return random queries, keys and values of GQA layers (4 query heads, 2 KV heads)."""
    batch_size, kv_len = prompt.modality.shape
    qo_len = kv_len if qo_len is None else qo_len
    kv_shape = (batch_size, NUM_KV_HEADS, kv_len, 8)
    return {
        "queries": [
            3 * torch.randn(batch_size, NUM_QO_HEADS, qo_len, 8) for _ in range(num_layers)
        ],
        "keys": [torch.randn(kv_shape) for _ in range(num_layers)],
        "values": [torch.randn(kv_shape) for _ in range(num_layers)],
    }


def one_sequence(layers: dict[str, list[Tensor]], b: int, row: str) -> dict[str, list[Tensor]]:
    """Return the tensors of one sequence of a batch, without its left padding."""
    padding = row.count(".")
    return {name: [t[b : b + 1, :, padding:] for t in tensors] for name, tensors in layers.items()}


def observe_all(policy: PrefillPolicy, prompt: Prompt, layers: dict[str, Any]) -> list[LayerScores]:
    """Return the scores of all layers."""
    prompt = replace(prompt, qo_len=layers["queries"][0].shape[2])
    tensors = zip(layers["queries"], layers["keys"], layers["values"], strict=True)
    return [policy.observe(q, k, v, prompt, policy.row_index(prompt)) for q, k, v in tensors]


def kept_lists(selection: Selection) -> list[list[list[int]]]:
    """Return the kept indices without their padding."""
    return [
        [row[:count].tolist() for row, count in zip(rows, counts.tolist(), strict=True)]
        for rows, counts in zip(selection.kept_indices, selection.kept_lens, strict=True)
    ]


def kept_of(
    selections: Sequence[Selection] | None, b: int, row: str, num_layers: int
) -> list[list[list[int]]]:
    """Return what each layer and list of one sequence keeps, counted from its first real token.

    Where nothing was evicted, all of it.
    """
    padding = row.count(".")
    if selections is None:
        return [[list(range(len(row) - padding))]] * num_layers
    return [[[j - padding for j in kept] for kept in kept_lists(s)[b]] for s in selections]
