"""Answers one behind the other, without padding, and where each row would lie if padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor


class Layout:
    """Where the rows of packed answers lie: what is a row at a time needs no more than the rows,
    attention pads its heads for a moment.

    Attributes:
        lengths: rows of each answer, in order; at least one answer of at least one row.
        length: T of the padded form.
        cells: of each row, its cell in the padded [A * T].
        positions: of each row, its place in its answer.
        remaining: of each row, how many its answer has from this one on.
    """

    def __init__(self, lengths: Sequence[int], length: int | None = None) -> None:
        self.lengths = tuple(lengths)
        self.length = max(self.lengths) if length is None else length
        sizes = np.array(self.lengths)
        positions = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        cells = positions + np.repeat(np.arange(len(sizes)) * self.length, sizes)
        table = torch.from_numpy(np.stack([cells, positions, np.repeat(sizes, sizes) - positions]))
        self._place(table)

    def to(self, device: torch.device | str) -> Layout:
        if self._table.device == torch.device(device):
            return self
        moved = object.__new__(Layout)
        moved.lengths, moved.length = self.lengths, self.length
        moved._place(self._table.to(device, non_blocking=True))
        return moved

    def _place(self, table: Int[Tensor, "3 N"]) -> None:
        self._table = table
        self.cells, self.positions, self.remaining = table.unbind(0)

    def pad(self, rows: Shaped[Tensor, N * rest]) -> Shaped[Tensor, "A T *rest"]:
        """A row an answer; zero where there is nothing."""
        num = len(self.lengths)
        padded: Tensor = _Pad.apply(rows, self.cells, num * self.length)  # type: ignore[no-untyped-call]
        return padded.view(num, self.length, *rows.shape[1:])

    def unpad(self, padded: Shaped[Tensor, "A T *rest"]) -> Shaped[Tensor, N * rest]:
        rows: Tensor = _Unpad.apply(padded.flatten(0, 1), self.cells)  # type: ignore[no-untyped-call]
        return rows


class _Pad(torch.autograd.Function):
    """Rows to their cells. Each goes to one of its own, so the gradient is a plain selection, where
    that of an index would be a sum over what might repeat."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, num_cells: int) -> Tensor:
        ctx.save_for_backward(cells)
        return rows.new_zeros(num_cells, *rows.shape[1:]).index_copy_(0, cells, rows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (cells,) = ctx.saved_tensors
        return outer[0].index_select(0, cells), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of ``_Pad``."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.num_cells = len(padded)
        return padded.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        grad = outer[0]
        return grad.new_zeros(ctx.num_cells, *grad.shape[1:]).index_copy_(0, cells, grad), None
