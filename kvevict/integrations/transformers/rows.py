"""The rows of a prompt that are still alive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvevict.integrations.transformers.attention import real_spans
from kvevict.policies.base import Prompt
from kvevict.policies.between import Shortening


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a prompt a layer sees.

    Attributes:
        num_columns: columns of the whole prompt, padding included.
        mask: [batch_size, num_rows] bool, False = padding; None = all real.
        index: [batch_size, num_rows] int64, the column of each row, ascending, padding in front;
            None = all of them.
        padding_lens: [batch_size] int32, padding columns of the whole prompt.
        restarted: [batch_size] bool, sequences whose rows are numbered 0, 1, ... anew; None = none.
        restart_decoding: so are the tokens that follow the prompt.
    """

    num_columns: int
    mask: Tensor | None
    padding_lens: Tensor
    index: Tensor | None = None
    restarted: Tensor | None = None
    restart_decoding: bool = False

    @classmethod
    def of_prompt(cls, key: Tensor, mask: Tensor | None) -> Rows:
        """Return all rows of a prompt, whose keys are [batch_size, *, num_columns, *]."""
        batch_size, _, num_columns, _ = key.shape
        padding = torch.zeros(batch_size, dtype=torch.int32, device=key.device)
        if mask is not None:
            padding = (num_columns - mask.sum(1)).int()
        return cls(num_columns, mask, padding)

    @cached_property
    def spans(self) -> list[tuple[int, int]] | None:
        """First and last + 1 real row of every sequence, None where all are; see `real_spans`."""
        return None if self.mask is None else real_spans(self.mask)

    @cached_property
    def columns(self) -> Tensor:
        """[batch_size, num_rows] int64: the column of each row."""
        if self.index is not None:
            return self.index
        column = torch.arange(self.num_columns, device=self.padding_lens.device)
        return column.expand(len(self.padding_lens), -1)

    @property
    def tags(self) -> Tensor:
        """[batch_size, 1, num_rows, 2] int32: column and position, -1 = padding."""
        columns = self.columns
        tags = torch.stack([columns, columns - self.padding_lens[:, None]], -1).int()
        if self.mask is not None:
            tags = tags.masked_fill(~self.mask[..., None], -1)
        return tags[:, None]

    def prompt(self, modality: Tensor) -> Prompt:
        """Return what the rows are.

        Args:
            modality: [batch_size, num_columns] int8 of the whole prompt.
        """
        if self.index is None:
            return Prompt(modality, self.mask)
        return Prompt(
            modality.gather(1, self.index),
            self.mask,
            total_lens=(self.num_columns - self.padding_lens).long(),
        )

    @property
    def new_positions(self) -> Tensor:
        """[batch_size, num_rows] int64: the real rows numbered 0, 1, ..."""
        if self.mask is not None:
            return (self.mask.cumsum(1) - 1).clamp(min=0)
        return torch.arange(self.columns.shape[1], device=self.columns.device).expand_as(
            self.columns
        )

    @property
    def num_removed(self) -> Tensor:
        """[batch_size] int64: real rows of the prompt that are not alive any more."""
        alive = self.columns.shape[1] if self.mask is None else self.mask.sum(1)
        return self.num_columns - self.padding_lens - alive

    def keep(self, shortening: Shortening) -> Rows:
        """Return the rows that are left; they end together, as a left-padded batch does."""
        selection = shortening.selection
        kept, lens = selection.kept_indices[:, 0].long(), selection.kept_lens[:, 0, None].long()
        k = kept.shape[1]
        rank = torch.arange(k, device=kept.device) - (k - lens)
        mask = rank >= 0
        index = kept.gather(1, rank.clamp(min=0)).clamp(min=0)
        restarted = shortening.restarted
        if restarted is None or self.restarted is None:
            restarted = self.restarted if restarted is None else restarted
        else:
            restarted = self.restarted | restarted
        return replace(
            self,
            mask=mask if selection.ragged else None,
            index=self.columns.gather(1, index),
            restarted=restarted,
            restart_decoding=self.restart_decoding or shortening.restart_decoding,
        )

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the rows of a tensor that has `num_columns` of them.

        Args:
            tensor: [..., batch_size | 1, num_columns, ...].
            dim: the dimension of the columns, negative; the one before it is the batch.
        """
        if self.index is None:
            return tensor
        shape = list(tensor.shape)
        shape[dim - 1] = len(self.index)
        index = self.index.view(*self.index.shape, *[1] * (-1 - dim))
        tensor = tensor.expand(shape)
        shape[dim] = self.index.shape[1]
        return tensor.gather(dim, index.expand(shape))

    @cached_property
    def _source(self) -> Tensor:
        """[batch_size, num_columns] int64: the row of each column, -1 = none."""
        columns, num_rows = self.columns, self.columns.shape[1]
        if self.mask is not None:
            columns = columns.where(self.mask, self.num_columns)
        row = torch.arange(num_rows, device=columns.device).expand_as(columns)
        source = row.new_full((len(columns), self.num_columns + 1), -1)
        return source.scatter_(1, columns, row)[:, :-1]

    def put(self, full: Tensor, rows: Tensor) -> Tensor:
        """Return `full` [batch_size, num_columns, hidden] with these rows replaced."""
        if self.index is None:
            return rows
        source = self._source[..., None]
        return rows.gather(1, source.clamp(min=0).expand_as(full)).where(source >= 0, full)
