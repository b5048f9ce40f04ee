"""Methods that shorten the prompt between two layers.

After chosen layers an engine hands a `LayerPolicy` the hidden states of the prompt, and later
layers run on the rows that are left: they compute and store less. Which rows these are, and what
becomes of the others (dropped, merged into a neighbor), is the policy's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from kvevict.policies.base import LayerScores, Prompt, Selection


@dataclass(frozen=True, eq=False)
class Shortening:
    """What goes on to the later layers.

    Attributes:
        selection: the rows that stay, one list per sequence: [batch_size, 1, k].
        hidden_states: [batch_size, kv_len, hidden] all rows, the staying ones with what was merged
            into them; None = as they were.
        restarted: [batch_size] bool, sequences whose rows later layers number 0, 1, ... anew; the
            rows of the others keep the positions they have. None = of all.
        restart_decoding: there the tokens after the prompt follow on that numbering; else they
            stand where they stand in the conversation.
    """

    selection: Selection
    hidden_states: Tensor | None = None
    restarted: Tensor | None = None
    restart_decoding: bool = False


@runtime_checkable
class LayerPolicy(Protocol):
    """Decides while the prompt passes through the layers."""

    def shortening_layers(self, num_layers: int) -> Sequence[int]:
        """Return the layers behind which `shorten` is called, ascending; empty = it never is."""
        ...

    def shorten(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        prompt: Prompt,
        *,
        stage: int,
        scores: LayerScores | None = None,
        sm_scale: float | None = None,
    ) -> Shortening | None:
        """Choose the rows that later layers see.

        Args:
            hidden_states: [batch_size, kv_len, hidden] the output of the layer, rows that earlier
                calls removed left out.
            query: [batch_size, num_qo_heads, kv_len, head_dim] of that layer's attention (rotated).
            key: [batch_size, num_kv_heads, kv_len, head_dim].
            prompt: what the rows are.
            stage: which of `shortening_layers` it was, counted from 0.
            scores: what the policy observed in this layer, if it is a `PrefillPolicy`, too.
            sm_scale: the scale of the logits; None = 1 / sqrt(head_dim).

        Returns:
            None where every row stays as it is.
        """
        ...
