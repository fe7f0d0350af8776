"""The key-value cache: memory allocated once, a length that only an integer moves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from xsd.pairs.device import to_device


class LayerWindow(NamedTuple):
    """One layer's views during a pass: where its new rows go, and all it will have then."""

    new_keys: Float[Tensor, "B heads R head_dim"]
    new_values: Float[Tensor, "B heads R head_dim"]
    keys: Float[Tensor, "B heads seen head_dim"]
    values: Float[Tensor, "B heads seen head_dim"]


class TreeRows(NamedTuple):
    """How the rows of one pass branch: set as ``KVCache.tree`` for the pass."""

    depths: Int[Tensor, " R"]
    """Positions after the first row's."""
    ancestors: Bool[Tensor, "R R"]
    """Rows of the pass that each row follows, itself included."""

    def filled(self, spare: int) -> TreeRows:
        """The same with so many rows more, which follow the first."""
        ancestors = pad(self.ancestors, (0, spare, 0, spare))
        ancestors[:, 0] = True
        ancestors.fill_diagonal_(True)
        return TreeRows(pad(self.depths, (0, spare), value=1), ancestors)


class KVCache:
    """Keys and values of every layer in two buffers of fixed size.

    ``length`` is the number of valid positions. Rolling back rejected drafts is an assignment to
    it: what lies beyond is overwritten by the next rows.

    Rows of a batch may have prompts of different lengths; shorter ones are padded on the left,
    and ``pad`` holds how many of a row's positions from ``pad_start`` on are padding. They may also
    keep different numbers of drafts: then ``ragged`` holds how far each is valid, and ``length`` is
    the longest of them. Every row's next positions are computed there, to be moved up to its own by
    ``keep_each``, or by compiled passes in place.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        slack: int | None = None,
    ) -> None:
        """``slack``: for compiled passes: that many positions more, and positions are a key's
        innermost axis in memory (same shape)."""
        self.keys: Float[Tensor, "layers B heads length head_dim"]
        self.values: Float[Tensor, "layers B heads length head_dim"]
        self.max_length = max_length
        self.slack = slack
        shape = (num_layers, batch, num_heads, max_length + (slack or 0), head_dim)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.keys = torch.zeros_like(self.values)
        if slack is not None:
            self.keys = self.keys.view(*shape[:3], head_dim, shape[3]).transpose(-1, -2)
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        self.length = 0
        self.pad: Int[Tensor, " B"] | None = None
        self.pad_start = 0
        self.ragged: list[int] | None = None
        self.tree: TreeRows | None = None
        self.whole = False
        """Set for a pass, it looks at the whole buffers, all beyond its rows masked: attention then
        sums over one length, and in one order, wherever the rows stand."""

    @property
    def batch(self) -> int:
        return int(self.values.shape[1])

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys [layers, B, heads, head_dim, length] and values of a cache for compiled passes."""
        if self._arrays is None:
            self._arrays = self.keys.transpose(-1, -2).numpy(), self.values.numpy()
            assert all(x.flags.c_contiguous for x in self._arrays), "a kernel takes whole buffers"
        return self._arrays

    @property
    def num_bytes(self) -> int:
        """Of all that positions need, slack not counted."""
        a_position = self.values[:, :, :, 0]
        return 2 * a_position.numel() * a_position.element_size() * self.max_length

    def reset(self) -> None:
        """Empty, and free of what was set for a pass that failed."""
        self.length = self.pad_start = 0
        self.pad = self.ragged = self.tree = None
        self.whole = False

    def keep(self, num_rows: int, kept: list[int]) -> None:
        """Of the last pass, of ``num_rows`` rows, keep these (ascending); they move together.

        A chain keeps its first rows, and nothing moves.
        """
        start = self.length - num_rows
        self.length = start + len(kept)
        if kept[-1] != len(kept) - 1:
            rows = to_device(kept, self.values.device) + start
            for buffer in (self.keys, self.values):
                buffer[:, :, :, start : self.length] = buffer[:, :, :, rows]

    def keep_each(self, num_rows: int, kept: Sequence[int]) -> None:
        """Of the last pass, of ``num_rows`` rows, batch row b keeps its first ``kept[b]``."""
        start, device = self.length - num_rows, self.values.device
        before = self.ragged or [start] * self.batch
        num_moved = max(kept)
        # Compiled passes put every row's positions behind its own.
        if self.slack is None and num_moved and min(before) < start:
            columns = to_device(before, device)[:, None] + self._columns(0, num_moved)
            rows = torch.arange(self.batch, device=device)[:, None]
            for buffer in (self.keys, self.values):
                by_row = buffer.permute(1, 3, 0, 2, 4)
                by_row[rows, columns] = by_row[:, start : start + num_moved].clone()
        self.ragged = [length + more for length, more in zip(before, kept, strict=True)]
        self.length = max(self.ragged)
        if self.pad is None:
            self.pad = torch.zeros(self.batch, dtype=torch.long, device=device)

    def check_room(self, num_rows: int) -> None:
        """
        Raises:
            AssertionError: R more rows do not fit.
        """
        end = self.length + num_rows
        assert end <= self.max_length, f"cache of {self.max_length} positions, {end} needed"

    def window(self, num_rows: int) -> list[LayerWindow]:
        """Every layer's views for a pass of R rows; ``length`` moves after the last layer."""
        start, end = self.length, self.length + num_rows
        seen = self.max_length if self.whole else end
        # Sliced once for all layers: at one row, views cost as much as arithmetic.
        parts = (
            buffer[:, :, :, columns].unbind(0)
            for columns in (slice(start, end), slice(seen))
            for buffer in (self.keys, self.values)
        )
        return [LayerWindow(*views) for views in zip(*parts, strict=True)]

    def positions(self, num_rows: int) -> slice | Int[Tensor, "B R"] | Int[Tensor, " R"]:
        """What the next R rows take out of a table of positions: one stretch, or a row each."""
        start, end = self.length, self.length + num_rows
        if self.tree is not None:
            return self.tree.depths + start
        if self.pad is None:
            return slice(start, end)
        if self.ragged is not None:
            first = to_device(self.ragged, self.values.device) - self.pad
            return first[:, None] + self._columns(0, num_rows)
        return (self._columns(start, end) - self.pad[:, None]).clamp_(min=0)

    def visible(self, num_rows: int) -> Bool[Tensor, "R seen"] | Bool[Tensor, "B R seen"] | None:
        """Which columns each of the next R rows may attend to; None: all of them."""
        start, end = self.length, self.length + num_rows
        seen = self.max_length if self.whole else end
        if self.tree is not None:
            behind = pad(self.tree.ancestors, (0, seen - end), value=False)
            return pad(behind, (start, 0), value=True)
        if self.pad is None and num_rows == 1 and not self.whole:
            return None
        rows, columns = self._columns(start, end)[:, None], self._columns(0, seen)
        causal = columns <= rows
        if self.pad is None:
            return causal
        real = columns >= self.pad_start + self.pad[:, None, None]
        if self.pad_start:
            real |= columns < self.pad_start
        if self.ragged is not None:
            valid = to_device(self.ragged, self.values.device)[:, None, None]
            real &= (columns < valid) | (columns >= start)
        # A row of padding sees itself: a softmax over nothing would be NaN.
        return causal & real | (columns == rows)

    def expand_from(self, prefix: KVCache) -> None:
        """Start the rows of this cache with those of ``prefix`` (shared visual prefixes).

        Each of its C rows is lent to the next B / C of these; padding comes behind it.
        """
        length = self.length = self.pad_start = prefix.length
        for mine, lent in ((self.keys, prefix.keys), (self.values, prefix.values)):
            by_lender = mine.unflatten(1, (prefix.batch, -1))
            by_lender[:, :, :, :, :length] = lent[:, :, None, :, :length]

    def first_rows(self, batch: int) -> KVCache:
        """A view of the first batch rows, empty."""
        view = KVCache.__new__(KVCache)
        view.keys, view.values = self.keys[:, :batch], self.values[:, :batch]
        view.max_length, view.slack = self.max_length, self.slack
        # Compiled passes take whole buffers, and the first entries of them.
        view._arrays = None if self.slack is None else self.arrays
        view.reset()
        return view

    def retire(self, going: Sequence[int]) -> list[int]:
        """Let all batch rows but these (ascending) leave, in place.

        The last rows move to where others have left: nothing else is copied.

        Returns:
            The old numbers of the rows, in their new order.
        """
        count, length = len(going), self.length
        order = list(range(count))
        movers = going[bisect_left(going, count) :]
        holes = sorted(set(order).difference(going))
        for hole, row in zip(holes, movers, strict=True):
            order[hole] = row
        for buffer in (self.keys, self.values) if holes else ():
            buffer[:, holes, :, :length] = buffer[:, movers, :, :length]
        if self.slack is not None:
            # Compiled passes take whole buffers, and the first entries of them.
            self._arrays = self.arrays
        self.keys, self.values = self.keys[:, :count], self.values[:, :count]
        if self.pad is not None:
            self.pad = self.pad[order]
        if self.ragged is not None:
            self.ragged = [self.ragged[row] for row in order]
            self.length = max(self.ragged)
        return order

    def _columns(self, start: int, end: int) -> Int[Tensor, " columns"]:
        return torch.arange(start, end, device=self.values.device)
