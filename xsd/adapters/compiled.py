"""Steps of a head in single precision on a CPU: one compiled call a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xsd import kernels
from xsd.adapters.rows import Ragged, Siblings, StepInputs

if TYPE_CHECKING:
    from xsd.adapters.attention import AttentionAdapter

Matrix = Float[np.ndarray, "in out"]
Bias = Float[np.ndarray, " out"]


def _fold(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"],
    norm: nn.LayerNorm | None = None,
    queries: int = 0,
    scale: float = 1.0,
) -> tuple[Matrix, Bias]:
    """``norm(x) @ weight.T + bias`` of a row that is normalised, but by no factors.

    ``scale`` goes into the first outputs, ``queries`` of them.
    """
    weight, bias = weight.t().double(), bias.double()
    if norm is not None:
        bias = bias + norm.bias.double() @ weight
        weight = norm.weight.double()[:, None] * weight
    scales = torch.ones_like(bias)
    scales[:queries] = scale
    return (weight * scales).float().numpy(), (bias * scales).float().numpy()


def _affine(
    linear: nn.Linear, norm: nn.LayerNorm | None = None, queries: int = 0, scale: float = 1.0
) -> tuple[Matrix, Bias]:
    return _fold(linear.weight, linear.bias, norm, queries, scale)


def _stack(parts: list[tuple[Matrix, Bias]]) -> tuple[np.ndarray, np.ndarray]:
    """Packed weights of all layers, and biases as wide as they."""
    weights, biases = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    packed = kernels.pack(weights)
    wide = np.zeros((len(parts), packed.shape[1] * kernels.PANEL), np.float32)
    wide[:, : biases.shape[1]] = biases
    return packed, wide


@dataclass(frozen=True, slots=True)
class Entrance:
    """How a head's rows begin: ``norm(state) @ weight.T``, beside token and position."""

    weight: Float[Tensor, "Dv Dv"]
    norm: nn.LayerNorm


class CompiledHead:
    """The weights of a head as the kernel takes them: copies."""

    @torch.no_grad()
    def __init__(
        self,
        head: AttentionAdapter,
        positions: Float[Tensor, "positions Dv"],
        entrance: Entrance | None,
        share: float = 1.0,
    ) -> None:
        """
        Args:
            positions: what is added to rows at each answer position.
            entrance: None: the head reads no states.
            share: of the output that is the head's own; the rest is the state it was given.
        """
        blocks, width = list(head.blocks), head.config.d_verifier
        self.num_layers, self.num_heads, self.width = len(blocks), head.config.num_heads, width
        (eps,) = {m.eps for m in head.modules() if isinstance(m, nn.LayerNorm)}
        is_gelu = head.activation is nn.GELU
        self.options = np.float32(eps), is_gelu, np.float32(1.0 - share)
        self.positions = positions.detach()
        self.entrance = np.zeros((0, width, kernels.PANEL), np.float32)
        if entrance is not None:
            no_bias = entrance.weight.new_zeros(width)
            weight, bias = _fold(entrance.weight, no_bias, entrance.norm)
            self.entrance = kernels.pack(weight)
            self.positions = self.positions + torch.from_numpy(bias)
        self.crosses = [block.cross for block in blocks if block.cross is not None]
        scale = (width // self.num_heads) ** -0.5
        queries = [_affine(c.query, c.norm, width, scale) for c in self.crosses]
        outs = [_affine(c.out) for c in self.crosses]
        # Without cross-attention any weights of the right kind will do: they are not read.
        unread = [(np.zeros((0, 0), np.float32), np.zeros(0, np.float32))] * len(blocks)
        stacks = [
            _stack(parts)
            for parts in (
                [_affine(b.query_key_value, b.norm_attention, width, scale) for b in blocks],
                [_affine(b.attention_out) for b in blocks],
                queries or unread,
                outs or unread,
                [_affine(b.up, b.norm_ffn) for b in blocks],
                [_affine(b.down) for b in blocks],
            )
        ]
        project, project_bias = _stack([_affine(head.project, head.norm_out, width, share)])
        self.weights = [self.entrance, *(w for w, _ in stacks), project[0]]
        self.biases = [*(b for _, b in stacks), project_bias[0]]
        self.arguments = (*self.weights, *self.biases, *self.options)
        """From ``entrance`` to ``kept``, as the kernels take them."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What drafting a chain needs to know of the tokens."""

    table: Float[np.ndarray, "ids Dv"]
    """``read_tokens`` of every embedding; of none, where the head reads no tokens."""
    panels: np.ndarray
    """The packed LM head."""
    num_ids: int
    """Choose among the first so many."""
    eos: Int[np.ndarray, " n"]
    """What ends a chain."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a draft may grow."""

    gamma: int
    """Levels."""
    width: int = 1
    """Branches of a node, and nodes of a level that branch; 1: a chain."""
    num_nodes: int = 1 << 16
    """Tokens that are kept."""
    is_sure: bool = False
    """Nobody asks for the confidences of a chain."""

    @property
    def num_guesses(self) -> int:
        return self.gamma * self.width**2

    @property
    def arguments(self) -> tuple[int, int, int, bool]:
        return self.gamma, self.width, self.num_nodes, self.is_sure


@dataclass(frozen=True, slots=True)
class Drafted:
    """The likeliest tokens first, parents before what follows them."""

    tokens: Int[np.ndarray, " n"]
    parents: Int[np.ndarray, " n"]
    """-1: the last token said."""
    confidence: Float[np.ndarray, " n"]
    num_levels: int
    """How deep was drafted, kept or not."""


class CompiledCache:
    """Keys and values of a batch of answers; the counterpart of ``AdapterCache``.

    ``length`` rows are valid. Setting it to a smaller number rolls back in O(1).
    """

    def __init__(self, head: CompiledHead, batch_size: int, max_length: int) -> None:
        self.head = head
        self.max_length = max_length
        self.length = 0
        columns, head_dim = max_length + kernels.PANEL, head.width // head.num_heads
        shape = (head.num_layers, batch_size, head.num_heads)
        self._keys = np.zeros((*shape, head_dim, columns), np.float32)
        self._values = np.zeros((*shape, columns, head_dim), np.float32)
        self._chain = np.zeros((0, 0), bool)
        self._positions = head.positions.numpy()
        self._memory = self._memories([])

    @torch.no_grad()
    def begin_sample(self, visual: Float[Tensor, "clips K Dv"] | None = None) -> None:
        """Forget all rows; attend to other visual vectors, where the head attends to any."""
        self.length = 0
        if self.head.crosses:
            assert visual is not None, "a level that attends to visual vectors is given them"
            self._memory = self._memories(
                [cross.project_memory(visual) for cross in self.head.crosses]
            )

    def step(self, rows: StepInputs, where: Siblings | Ragged | None) -> Float[Tensor, "B R Dv"]:
        """Append rows and return their outputs (see ``Adapter.step``)."""
        given = rows.verifier if rows.token is None else rows.token
        assert given is not None, "a head reads tokens or states"
        batch, num_rows, width = given.shape
        column = begin = np.full(batch, self.length)
        end, seen = self.length + num_rows, self._chain
        positions: Tensor = self.head.positions
        if where is None:
            positions = positions[self.length : end]
        elif isinstance(where, Ragged):
            positions, end = positions[where.positions], where.end
            column = begin = where.positions[:, 0].numpy()
        else:
            # A tree's rows look among all columns; they stand at one position.
            begin, seen = np.zeros(batch, np.int64), where.visible.numpy()
            positions = positions[where.position : where.position + 1]
        assert end <= self.max_length, f"cache of {self.max_length} rows is full"
        token = torch.zeros_like(given) if rows.token is None else rows.token
        known = (token + positions).reshape(-1, width).contiguous().numpy()
        # A head that reads no states has no weights for them either.
        states = known
        if rows.verifier is not None:
            states = rows.verifier.reshape(-1, width).contiguous().numpy()
        out = np.empty((batch * num_rows, width), np.float32)
        kernels.head_pass(
            known, states, *self.head.weights, *self.head.biases, *self.head.options,
            self._keys, self._values, *self._memory, column, begin, seen, out,
        )  # fmt: skip
        if not isinstance(where, Ragged):
            self.length = end
        return torch.from_numpy(out).view(batch, num_rows, width)

    def draft(
        self,
        said: Sequence[int],
        states: Float[Tensor, "m Dv"],
        vocabulary: Vocabulary,
        shape: Shape,
        rule: tuple[np.ndarray, ...],
    ) -> Drafted:
        """What may follow ``said``, the new tokens of the one answer, whose states these are:
        steps, choices and all in one call. ``rule``: see ``kernels.rule``."""
        tokens, parents = np.empty((2, shape.num_guesses), np.int64)
        confidence, joint = np.empty((2, shape.num_guesses))
        arrays = tokens, parents, confidence, joint
        count, num_levels = self.drafting(said, states, vocabulary, shape, rule, arrays)()
        return Drafted(tokens[:count], parents[:count], confidence[:count], num_levels)

    def drafting(
        self,
        said: Sequence[int],
        states: Float[Tensor, "m Dv"],
        vocabulary: Vocabulary,
        shape: Shape,
        rule: tuple[np.ndarray, ...],
        arrays: tuple[np.ndarray, ...],
    ) -> Callable[[], tuple[int, int]]:
        """The call alone, into ``arrays``."""
        num_rows = len(said) + (shape.gamma - 1) * shape.width
        assert self.length + num_rows <= self.max_length, "the cache is full"
        return partial(
            kernels.draft, np.array(said), states.contiguous().numpy(), self.length,
            self.head.arguments, self.past, self.words(vocabulary), rule, *shape.arguments, *arrays,
        )  # fmt: skip

    @property
    def past(self) -> tuple[np.ndarray | int, ...]:
        """What the kernels look back on, as they take it."""
        return (self._keys, self._values, *self._memory)

    def words(self, vocabulary: Vocabulary) -> tuple[np.ndarray | int, ...]:
        """What the kernels read of tokens and positions, as they take it."""
        return (
            vocabulary.table,
            self._positions,
            vocabulary.panels,
            vocabulary.num_ids,
            vocabulary.eos,
        )

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Only these rows of the batch go on (finished answers retire)."""
        kept = rows.numpy()
        self._keys, self._values = (
            np.ascontiguousarray(x[:, kept]) for x in (self._keys, self._values)
        )
        keys, values, size = self._memory
        if keys.shape[1] > 1:
            self._memory = (
                np.ascontiguousarray(keys[:, kept]),
                np.ascontiguousarray(values[:, kept]),
                size,
            )

    def _memories(
        self, memories: list[Float[Tensor, "2 clips H K Dh"]]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Keys, values and number of what the blocks look at besides the answer."""
        layers, _, heads, head_dim, _ = self._keys.shape
        clips, size = memories[0].shape[1::2] if memories else (1, 0)
        keys = np.zeros((layers, clips, heads, head_dim, size + kernels.PANEL), np.float32)
        values = np.zeros((layers, clips, heads, size + kernels.PANEL, head_dim), np.float32)
        for layer, memory in enumerate(memories):
            both = memory.numpy()
            keys[layer, ..., :size] = both[0].swapaxes(-1, -2)
            values[layer, :, :, :size] = both[1]
        return keys, values, size
