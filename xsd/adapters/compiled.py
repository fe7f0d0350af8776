"""Steps of a head in single precision on a CPU: one compiled call a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xsd import kernels
from xsd.adapters.rows import Ragged, Siblings, StepInputs
from xsd.pairs.folded import affine, fold, stack

if TYPE_CHECKING:
    from xsd.adapters.attention import AttentionAdapter
    from xsd.adapters.entry import DrafterEntry


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
        entry: DrafterEntry | None = None,
    ) -> None:
        """
        Args:
            positions: what is added to rows at each answer position.
            entrance: None: rows begin with no states.
            share: of the output that is the head's own; the rest is the state it was given.
            entry: what rows begin with of the drafter's states; None: the head reads none.
        """
        self.entry = entry
        blocks, width = list(head.blocks), head.config.d_verifier
        self.num_layers, self.num_heads, self.width = len(blocks), head.config.num_heads, width
        (eps,) = {m.eps for m in head.modules() if isinstance(m, nn.LayerNorm)}
        is_gelu = head.activation is nn.GELU
        self.options = np.float32(eps), is_gelu, np.float32(1.0 - share)
        self.positions = positions.detach()
        self.entrance = np.zeros((0, width, kernels.PANEL), np.float32)
        if entrance is not None:
            no_bias = entrance.weight.new_zeros(width)
            weight, bias = fold(entrance.weight, no_bias, entrance.norm)
            self.entrance = kernels.pack(weight)
            self.positions = self.positions + torch.from_numpy(bias)
        crosses = [block.cross for block in blocks if block.cross is not None]
        self.reading: tuple[np.ndarray, np.ndarray] | None = None
        """What makes keys and values of the clip's vectors; None: the blocks attend to none."""
        if crosses and (entry is None or not len(entry.remember)):
            self.reading = stack([affine(cross.key_value, cross.norm_memory) for cross in crosses])
        scale = (width // self.num_heads) ** -0.5
        queries = [affine(c.query, c.norm, width, scale) for c in crosses]
        outs = [affine(c.out) for c in crosses]
        # Without cross-attention any weights of the right kind will do: they are not read.
        unread = [(np.zeros((0, 0), np.float32), np.zeros(0, np.float32))] * len(blocks)
        stacks = [
            stack(parts)
            for parts in (
                [affine(b.query_key_value, b.norm_attention, width, scale) for b in blocks],
                [affine(b.attention_out) for b in blocks],
                queries or unread,
                outs or unread,
                [affine(b.up, b.norm_ffn) for b in blocks],
                [affine(b.down) for b in blocks],
            )
        ]
        project, project_bias = stack([affine(head.project, head.norm_out, width, share)])
        self.weights = [self.entrance, *(w for w, _ in stacks), project[0]]
        self.biases = [*(b for _, b in stacks), project_bias[0]]

    @cached_property
    def drafting(self) -> tuple[np.ndarray, ...]:
        """Weights and biases for drafts, which may be wrong: rounded to bfloat16, a level reads
        half as many bytes, and a cycle's levels find them in a core's own cache."""
        assert self.width % 2 == 0, "rows have no column more"
        return (*map(kernels.halve, self.weights), *self.biases)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """From ``entrance`` to ``kept``, as the kernels that draft take them."""
        return (*self.drafting, *self.options)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What drafting a chain needs to know of the tokens."""

    table: Float[np.ndarray, "ids Dv"]
    """``read_tokens`` of every embedding; of none, where the head reads no tokens."""
    panels: np.ndarray
    """The packed LM head, halved as a head's own weights are."""
    num_ids: int
    """Choose among the first so many."""
    eos: Int[np.ndarray, " n"]
    """What ends a chain."""


@dataclass(slots=True)
class ReadAlong:
    """A drafter that reads what is drafted, as the kernel takes it."""

    embedding: Float[np.ndarray, "ids Dd"]
    decoder: tuple[Any, ...]
    """``decoder_pass``'s arguments from weights to cache."""
    states: Float[np.ndarray, "positions Dd"]
    """After the prompt and so many tokens."""
    prompt_length: int
    num_read: int
    """Tokens of the answer that it has read, and of which its cache and states hold."""


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
        self._remembers = head.entry is not None and len(head.entry.remember) > 0
        self._memory = self._memories(1, 0)
        if self._remembers:
            # One column more than rows: the drafter's states run one ahead.
            self._memory = *self._memories(batch_size, max_length + 1)[:2], -1

    @torch.no_grad()
    def begin_sample(self, visual: Float[Tensor, "clips K Dv"] | None = None) -> None:
        """Forget all rows; attend to other visual vectors, where the head attends to any."""
        self.length = 0
        if self.head.reading is None:
            return
        assert visual is not None, "a level that attends to visual vectors is given them"
        clips, size, width = visual.shape
        if (self._memory[0].shape[1], self._memory[2]) != (clips, size):
            self._memory = self._memories(clips, size)
        kernels.remember(
            visual.contiguous().view(clips * size, width).numpy(), *self.head.reading,
            self.head.options[0], *self._memory[:2], 0,
        )  # fmt: skip

    def step(self, rows: StepInputs, where: Siblings | Ragged | None) -> Float[Tensor, "B R Dv"]:
        """Append rows and return their outputs (see ``Adapter.step``)."""
        given = next(x for x in (rows.token, rows.verifier, rows.drafter) if x is not None)
        (batch, num_rows), width = given.shape[:2], self.head.width
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
        token = torch.zeros(batch, num_rows, width) if rows.token is None else rows.token
        known = (token + positions).reshape(-1, width).contiguous().numpy()
        # A head that reads no states has no weights for them either.
        states = known
        if rows.verifier is not None:
            states = rows.verifier.reshape(-1, width).contiguous().numpy()
        if rows.drafter is not None:
            states = self._enter(rows.drafter, known, states)
        out = np.empty((batch * num_rows, width), np.float32)
        kernels.head_pass(
            known, states, *self.head.weights, *self.head.biases, *self.head.options,
            self._keys, self._values, *self._memory, column, begin, seen, out,
        )  # fmt: skip
        if not isinstance(where, Ragged):
            self.length = end
        return torch.from_numpy(out).view(batch, num_rows, width)

    def _enter(
        self, drafter: Float[Tensor, "B n Dd"], known: np.ndarray, verifier: np.ndarray
    ) -> np.ndarray:
        """Add to ``known`` what the drafter's states say; the states that the rows begin with."""
        assert self.head.entry is not None, "the head reads no drafter"
        states = np.empty_like(known)
        since = self.length + 1 if self.length and self._remembers else self.length
        kernels.enter_rows(
            drafter.reshape(-1, drafter.shape[-1]).contiguous().numpy(), verifier,
            tuple(self.head.entry), self.head.options[0], *self._memory[:2], since, known, states,
        )  # fmt: skip
        return states

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

    def draft_coupled(
        self,
        said: Sequence[int],
        first: int,
        states: Float[Tensor, "m Dv"],
        gamma: int,
        vocabulary: Vocabulary,
        drafter: ReadAlong,
        shift: int,
    ) -> tuple[list[int], list[float]]:
        """At most ``gamma`` tokens behind an answer; at each step ``drafter`` reads the last one.

        Args:
            said: all of the answer.
            first: position of the first row that is not, or not rightly, in the cache.
            states: the verifier's from there on, where the level reads any.
            shift: the level's.

        Returns them, and how probable each is.
        """
        assert self.head.entry is not None and len(said) + gamma - shift <= self.max_length
        sequence = np.empty(len(said) + gamma, np.int64)
        sequence[: len(said)] = said
        confidence = np.empty(gamma)
        count, drafter.num_read = kernels.coupled_chain(
            sequence, len(said), drafter.num_read, drafter.prompt_length, drafter.states,
            drafter.embedding, drafter.decoder, first, shift, states.contiguous().numpy(),
            vocabulary.table, self._positions, vocabulary.eos, vocabulary.panels,
            vocabulary.num_ids,
            tuple(self.head.entry), self.head.drafting, *self.head.options,
            self._keys, self._values, *self._memory, confidence,
        )  # fmt: skip
        return sequence[len(said) : len(said) + count].tolist(), confidence[:count].tolist()

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

    def _memories(self, batch: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Room for keys and values of what the blocks look at besides the answer, and how many
        there are."""
        layers, _, heads, head_dim, _ = self._keys.shape
        shape, room = (layers, batch, heads), size + kernels.PANEL
        keys = np.zeros((*shape, head_dim, room), np.float32)
        values = np.zeros((*shape, room, head_dim), np.float32)
        return keys, values, size
