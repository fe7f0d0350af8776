"""Keys and values that attention looks back on: of a training chain, or of live decoding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from xsd.adapters.layout import Layout

Heads = Float[Tensor, "B H R Dh"]
"""Rows of every head: H of width Dh."""
KeyValue = Float[Tensor, "2 B H _ Dh"]
"""Keys and values of one layer, stacked: H heads of width Dh, some number of positions."""


class Past:
    """What a block needs to know of earlier rows."""

    def __init__(self, memory: list[Tensor]) -> None:
        self.mask: Tensor | None = None
        """True where a row may look, or what is added to its scores; None: everywhere."""
        self.memory = memory
        """Keys and values of the cross-attention, a layer each."""
        self.memory_mask: Tensor | None = None

    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        """Add the keys and values of this pass; return all that a layer has."""
        raise NotImplementedError

    def attend(self, layer: int, qkv: Float[Tensor, "3 B H R Dh"], rate: float) -> Heads:
        """Self-attention of new rows, which become part of the past."""
        keys, values = self.extend(layer, qkv.narrow(0, 1, 2)).unbind(0)
        return scaled_dot_product_attention(qkv.select(0, 0), keys, values, self.mask, rate)

    def recall(self, layer: int, query: Heads) -> Heads:
        """Cross-attention of new rows to the memory."""
        keys, values = self.memory[layer].unbind(0)
        return scaled_dot_product_attention(query, keys, values, self.memory_mask)


class Chain(Past):
    """Keys of a parallel pass over packed answers, and of the steps unrolled from it.

    At step ``k`` row ``t`` of an answer stands at position ``t + k``. It sees the true keys up to
    ``t`` and, of each later step, only the key of its own row: hence a causal square of scores,
    then a column a step. Padding, at an answer's end, is ahead of all that counts.
    """

    def __init__(
        self,
        layout: Layout,
        memory: list[Float[Tensor, "2 B H K Dh"]],
        *,
        ahead: bool,
        bidirectional: bool = False,
    ) -> None:
        super().__init__([self._padded(layout, x) for x in memory] if ahead else memory)
        size, device = layout.length, layout.cells.device
        self._layout, self._ahead = layout, ahead
        self._ones = torch.ones(size, size, dtype=torch.bool, device=device)
        self._passes: list[list[tuple[Tensor, Tensor]]] = []
        if bidirectional:
            real = torch.ones(len(layout.cells), dtype=torch.bool, device=device)
            self.mask = layout.pad(real)[:, None, None, :]
        self.begin(0)

    def begin(self, step: int) -> None:
        """Go on to unrolled step ``step``; 0 is the parallel pass."""
        # A row at position p has read token y[p], and so has the drafter's state e[p + 1].
        self.memory_mask = self._ones.tril(step + 1) if self._ahead else None

    def attend(self, layer: int, qkv: Float[Tensor, "3 1 H N Dh"], rate: float) -> Heads:
        query, keys, values = self._padded(self._layout, qkv)
        if layer == len(self._passes):
            self._passes.append([])
        passes = self._passes[layer]
        passes.append((keys, values))
        if len(passes) > 1:
            return self._packed(self._after_the_anchor(query, passes, rate))
        return self._packed(
            scaled_dot_product_attention(
                query, keys, values, self.mask, rate, is_causal=self.mask is None
            )
        )

    def recall(self, layer: int, query: Float[Tensor, "1 H N Dh"]) -> Heads:
        (padded,) = self._padded(self._layout, query[None])
        return self._packed(super().recall(layer, padded))

    def _after_the_anchor(
        self,
        query: Float[Tensor, "A H T Dh"],
        passes: list[tuple[Tensor, Tensor]],
        rate: float,
    ) -> Float[Tensor, "A H T Dh"]:
        (keys, values), later = passes[0], passes[1:]
        query = query * query.shape[-1] ** -0.5
        anchored = (query @ keys.mT).masked_fill(~self._ones.tril(), -torch.inf)
        own = [(query * keys).sum(dim=-1, keepdim=True) for keys, _ in later]
        weights = torch.cat([anchored, *own], dim=-1).softmax(dim=-1)
        weights = dropout(weights, rate, training=rate > 0.0)
        size = values.shape[2]
        out = weights[..., :size] @ values
        for k, (_, own_values) in enumerate(later):
            out = out + weights[..., size + k, None] * own_values
        return out

    @staticmethod
    def _padded(
        layout: Layout, heads: Float[Tensor, "parts 1 H N Dh"]
    ) -> Float[Tensor, "parts A H T Dh"]:
        rows = heads[:, 0].permute(2, 0, 1, 3)
        return layout.pad(rows).permute(2, 0, 3, 1, 4)

    def _packed(self, heads: Float[Tensor, "A H T Dh"]) -> Float[Tensor, "1 H N Dh"]:
        return self._layout.unpad(heads.transpose(1, 2)).transpose(0, 1)[None]


class AdapterCache(Past):
    """Preallocated keys and values of live decoding.

    ``length`` rows are valid. Setting it to a smaller number rolls back in O(1).
    """

    def __init__(
        self,
        twin: Any,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        max_length: int,
        like: Tensor,
    ) -> None:
        shape = (2, batch_size, num_heads, max_length, head_dim)
        super().__init__([])
        self.twin = twin
        """The adapter as ``live.bind`` prepares it."""
        self.length = 0
        self.max_length = max_length
        self._buffers = [like.new_zeros(shape) for _ in range(num_layers)]
        self._memory_buffers: list[Tensor] = []
        self._num_rows = 0
        # One more column than rows: drafter states run one ahead.
        hidden = like.new_full((max_length, max_length + 1), -torch.inf)
        self._bias, self._bias_ahead = hidden.triu(1), hidden.triu(2)
        self._columns: Int[Tensor, "1 B 1 R 1"] | None = None
        self._end = 0

    def begin_sample(self, visual: Float[Tensor, "clips K D"] | None = None) -> None:
        """Forget all rows; attend to other visual vectors, where the level attends to any."""
        self.length = 0
        blocks = self.twin.blocks
        if self.twin.memory == "visual":
            assert visual is not None, "a level that attends to visual vectors is given them"
            # One clip's vectors may serve a whole batch.
            batch_size = self._buffers[0].shape[1]
            self.memory = [
                block.project_memory(visual).expand(-1, batch_size, -1, -1, -1) for block in blocks
            ]
        elif self.twin.memory == "drafter":
            # Room for drafter states, which arrive one by one and run one ahead of the rows.
            self._memory_buffers = self._memory_buffers or [
                torch.cat([buffer, buffer[:, :, :, :1]], dim=3) for buffer in self._buffers
            ]
            self.memory = list(self._memory_buffers)

    def begin(
        self, num_rows: int, *, ahead: bool, visible: Bool[Tensor, "R end"] | None = None
    ) -> None:
        """Prepare to append ``num_rows`` rows after ``length``.

        Args:
            visible: what each of them may look at; None: all before it, and itself.
        """
        start, end = self.length, self.length + num_rows
        assert end <= self.max_length, f"cache of {self.max_length} rows is full"
        self._num_rows, self._columns = num_rows, None
        self.mask = self.memory_mask = None
        if visible is not None:
            self.mask = self._bias.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        elif num_rows > 1:
            self.mask = self._bias[start:end, :end]
        if num_rows > 1 and ahead:
            self.memory_mask = self._bias_ahead[start:end, : end + 1]

    def begin_ragged(self, positions: Int[Tensor, "B R"], end: int) -> None:
        """Prepare to write every batch row's new rows at its own positions, all below ``end``.

        A row's column is its position, so whatever stands before it is the row's own past.
        """
        assert end <= self.max_length, f"cache of {self.max_length} rows is full"
        self._columns, self._end = positions[None, :, None, :, None], end
        columns = torch.arange(end, device=positions.device)
        self.mask = (columns <= positions[:, :, None])[:, None]
        self.memory_mask = None

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Only these rows of the batch go on (finished answers retire)."""
        self._buffers = [buffer.index_select(1, rows) for buffer in self._buffers]
        self.memory = [memory.index_select(1, rows) for memory in self.memory]

    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        buffer: Tensor = self._buffers[layer]
        if self._columns is not None:
            buffer.scatter_(3, self._columns.expand_as(new), new)
            return buffer.narrow(3, 0, self._end)
        buffer.narrow(3, self.length, self._num_rows).copy_(new)
        return buffer.narrow(3, 0, self.length + self._num_rows)

    def extend_memory(self, layer: int, new: KeyValue) -> None:
        """Write drafter states: from position 0 at the start, else from ``length + 1``."""
        first = self.length + 1 if self.length else 0
        end = self.length + self._num_rows + 1
        assert new.shape[3] == end - first, f"expected {end - first} drafter states"
        buffer = self._memory_buffers[layer]
        buffer.narrow(3, first, end - first).copy_(new)
        self.memory[layer] = buffer.narrow(3, 0, end)
