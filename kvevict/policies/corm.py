"""CORM: a key stays while some recent query finds it important (arXiv 2404.15949)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict import ops
from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.policies._shares import keep_whole
from kvevict.policies.base import LayerScores, Policy, Prompt
from kvevict.priority import FORCED, build_priority


@dataclass(frozen=True)
class CORM(Policy):
    """No preset budget: keys that no row of the window attends to above average are evicted.

    Key j is minor for the t-th query if its attention is below 1 / t, the mean over the t keys that
    the query sees. A key goes when it is minor for each of the last `window` queries, in every
    query head of its group; the newest `num_recent` never do. One list per KV head, of the length
    that the rule gives.

    This is the prefill part: the last rows of the prompt stand for the history that the method
    gathers while decoding. The defaults of both fields are from memory and not checked.

    The score of a key is the largest t * attention of these rows, so major keys have 1 or more.
    `keep` limits what stays, sinks and recent keys included, the highest scores first; a prompt
    that fits into it stays whole. To leave something to choose, a limit forces at most its newer
    half of recent keys.

    Attributes:
        keep: at most this much of the prompt (float) or this many tokens per list (int); None = no
            limit.
        num_sink: first tokens that stay (0 in the published form).
        window: rows that vote (256).
        num_recent: newest keys that stay (256).
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.GROUP_MAX
    statistic: ClassVar[Statistic] = Statistic.MAX
    sets_budget: ClassVar[bool] = True

    keep: float | int | None = None
    window: int = 256
    num_recent: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("window", minimum=1)
        self._require_count("num_recent", minimum=0)

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the last `window` real rows of every sequence."""
        return prompt.last_rows(self.window)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: Prompt,
        row_index: Tensor | None,
        *,
        sm_scale: float | None = None,
        softmax_lse: Tensor | None = None,
    ) -> LayerScores:
        """Compare attention with its mean [batch_size, num_kv_heads, kv_len]."""
        rows = self.row_index(prompt) if row_index is None else row_index
        num_rows = (rows >= 0).sum(1, keepdim=True)
        place = torch.arange(rows.shape[1], device=rows.device)
        num_seen = prompt.lens[:, None] - num_rows + place + 1
        scores = ops.score_keys(
            query,
            key,
            row_index=rows,
            row_weight=num_seen.float(),
            softmax_lse=softmax_lse,
            key_mask=prompt.key_mask,
            sm_scale=sm_scale,
            statistic=self.statistic,
            head_reduction=self.head_reduction,
        )
        return LayerScores(scores=scores, prompt=prompt)

    def budgets(self, layers: Sequence[LayerScores]) -> Tensor:
        """Count the keys that stay [num_layers, batch_size, num_kv_heads] int64."""
        counts = []
        for layer in layers:
            limit = self.keep_tokens(layer.prompt)
            forced = (self.priority(layer.prompt, limit) == FORCED)[:, None]
            # A uniform row makes every key major, whichever way it was rounded.
            major = (layer.scores >= 1 - 1e-5) & layer.prompt.valid[:, None]
            counts.append((major | forced).sum(2).minimum(limit[:, None]))
        return keep_whole(self, layers, torch.stack(counts))

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the sinks and the newest keys, as far as `keep` allows."""
        if self.keep is None:
            return build_priority(prompt.valid, num_sink=self.num_sink, num_recent=self.num_recent)
        return self.force(prompt, self.keep_tokens(prompt), num_recent=self.num_recent)
