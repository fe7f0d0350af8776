"""Keys and values that attention looks back on: of a training chain, or of live decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KeyValue = Float[Tensor, "2 B H _ Dh"]
"""Keys and values of one layer, stacked: H heads of width Dh, some number of positions."""


class Past(ABC):
    """What a block needs to know of earlier rows."""

    def __init__(self, memory: list[Tensor]) -> None:
        self.mask: Tensor | None = None
        """True where a row may look, or what is added to its scores; None: everywhere."""
        self.memory = memory
        """Keys and values of the cross-attention, a layer each."""
        self.memory_mask: Tensor | None = None

    @abstractmethod
    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        """Add the keys and values of this pass; return all that a layer has."""


class Chain(Past):
    """Keys of a parallel pass and of the steps unrolled from it.

    At step ``k`` row ``t`` stands at position ``t + k``. It sees the true keys up to ``t`` and, of
    each later step, only the key of its own row: hence a causal mask, then diagonals.
    """

    def __init__(
        self,
        length: int,
        device: torch.device,
        visible: Bool[Tensor, "B T"] | None,
        memory: list[Float[Tensor, "2 B H K Dh"]],
        *,
        ahead: bool,
    ) -> None:
        super().__init__(memory)
        self._ones = torch.ones(length, length, dtype=torch.bool, device=device)
        self._passes: list[list[Tensor]] = []
        self._ahead = ahead
        self.begin(0)
        if visible is not None:
            self.mask = visible[:, None, None, :]

    def begin(self, step: int) -> None:
        """Set the masks of unrolled step ``step``; 0 is the parallel pass."""
        causal = self._ones.tril()
        diagonal = causal & self._ones.triu()
        self.mask = torch.cat([causal, *[diagonal] * step], dim=1)
        # A row at position p has read token y[p], and so has the drafter's state e[p + 1].
        self.memory_mask = self._ones.tril(step + 1) if self._ahead else None

    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        if layer == len(self._passes):
            self._passes.append([])
        self._passes[layer].append(new)
        return torch.cat(self._passes[layer], dim=3)


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

    def begin_sample(self, visual: Float[Tensor, "B K D"] | None = None) -> None:
        """Forget all rows; attend to other visual vectors, where the level attends to any."""
        self.length = 0
        blocks = self.twin.blocks
        if self.twin.memory == "visual":
            self.memory = [block.project_memory(visual) for block in blocks]
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
        self._num_rows = num_rows
        self.mask = self.memory_mask = None
        if visible is not None:
            self.mask = self._bias.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        elif num_rows > 1:
            self.mask = self._bias[start:end, :end]
        if num_rows > 1 and ahead:
            self.memory_mask = self._bias_ahead[start:end, : end + 1]

    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        buffer: Tensor = self._buffers[layer]
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
