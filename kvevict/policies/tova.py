"""TOVA: the last token alone decides what is omitted (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvevict.ops.enums import HeadReduction
from kvevict.policies.base import Policy, Prompt


@dataclass(frozen=True)
class TOVA(Policy):
    """The tokens that the last token attends to most stay, its attention averaged over all heads.

    The prefill part of the method, as in kvpress: one step at the end of the prompt, the last token
    always kept. One list per layer, shared by its heads. The budget is `keep` tokens per layer,
    everything included.

    Attributes:
        keep: ratio of the prompt (float) or tokens per layer (int).
        num_sink: first tokens that stay (0 in the published form, which relies on attention).
    """

    head_reduction: ClassVar[HeadReduction] = HeadReduction.ALL_MEAN

    def row_index(self, prompt: Prompt) -> Tensor:
        """Return the last real row."""
        return prompt.last_rows(1)

    def priority(self, prompt: Prompt, budget: Tensor) -> Tensor:
        """Force the last token and the sinks."""
        return self.force(prompt, budget, num_recent=1)
