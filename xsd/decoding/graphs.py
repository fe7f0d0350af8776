"""Heads on a GPU: a whole chain of drafts is one CUDA graph, and no id is read on its way.

A head's step is a dozen small kernels and an LM head; launched one by one, a chain would cost the
host as much as the verifier's pass costs the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.cache import KeyValue, Past
from xsd.adapters.live import bind
from xsd.adapters.rows import StepInputs
from xsd.decoding.accept import Draft, Sampling, draw
from xsd.decoding.config import MAX_GAMMA
from xsd.decoding.draft import HeadDrafter, HeadOptions
from xsd.decoding.policy import Policy
from xsd.decoding.reader import DrafterReader
from xsd.decoding.tables import VerifierTables
from xsd.decoding.unread import Unread
from xsd.pairs.capture import Capture, Lane
from xsd.pairs.device import to_device

READ_ROWS = 17
"""Rows that a drafter reads at once, at most: a cycle adds no more."""


class CapturedChains:
    """Chains of a head; where it reads the drafter, that one reads along in the graph."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_length: int,
        sampling: Sampling | None = None,
    ) -> None:
        """
        Args:
            max_length: answer positions that are ever drafted from.
            sampling: draw tokens like this; None: take the likeliest.

        Raises:
            XsdError: the head has learned fewer.
        """
        assert can_capture(head), f"level {head.row.name} does not draft by itself"
        head.check_length(max_length)
        self._tables, self._sampling = tables, sampling
        self._twin = bind(head)
        like = next(head.parameters())
        self._dtype, self.device = like.dtype, like.device
        self._rows = Rows(head, max_length, like)
        self._reads_verifier = "verifier" in head.row.streams
        self._reads_token = "token" in head.row.streams
        self._reader: DrafterReader | None = None
        self._heard = like.new_zeros(max_length + 1, head.config.d_drafter).detach()
        """The drafter's states by answer position, where the head does not attend to them."""
        self._start = torch.zeros(1, dtype=torch.long, device=like.device)
        self._drawn_with = torch.zeros(MAX_GAMMA, dtype=torch.double, device=like.device)
        """Random numbers of a chain: made outside of a graph, which would repeat its own."""
        self._lane = Lane(like.device)
        self._chains: dict[tuple[int, int], _Chain] = {}

    @torch.inference_mode()
    def begin(
        self, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None = None
    ) -> None:
        """A sample begins, with the clip's visual vectors where the head attends to them, and the
        drafter behind its prompt where it reads that."""
        if reader is not self._reader:
            self._reader = reader
            self._chains.clear()
        if reader is not None:
            self._hear(reader.begin_at(), torch.zeros_like(self._start))
        if self._twin.memory == "visual":
            assert visual is not None, "the head attends to visual states"
            if not self._rows.look_at(self._twin, visual.to(self._dtype)):
                self._chains.clear()

    @torch.inference_mode()
    def draft(
        self,
        ids: Sequence[int] | Int[Tensor, " m"],
        states: Float[Tensor, "m Dv"],
        start: int,
        gamma: int,
        chances: Float[Tensor, " gamma"] | None = None,
    ) -> Unread:
        """What follows, on the device; nothing waits for it. Rows from ``start`` on are replaced.

        Args:
            ids: the last m tokens said; ``states``: the verifier's states of them.
            start: answer position of the first of them.
            chances: uniform on [0, 1), where tokens are drawn: a number for each.

        Returns:
            All of the chain; the next one of this shape overwrites it.
        """
        num_rows = len(states)
        end = start + num_rows + gamma - 1
        assert end <= self._rows.length, "the head's cache is full"
        if self._reader is not None:
            self._reader.check_room(end)
        assert (chances is None) == (self._sampling is None), "drawing takes random numbers"
        if chances is not None:
            self._drawn_with[:gamma].copy_(chances, non_blocking=True)
        given = ids if isinstance(ids, Tensor) else to_device(ids, self.device)
        given, states = self._catch_up(given, states, start, gamma)
        chain = self._chains.get((len(given), gamma))
        if chain is None:
            read, seen = given.clone(), states.to(self._dtype, copy=True)
            capture = Capture(lambda: self._chain(read, seen, gamma), self._lane)
            chain = self._chains[len(given), gamma] = _Chain(read, seen, capture.replay)
        else:
            chain.ids.copy_(given, non_blocking=True)
            chain.states.copy_(states)
        return _left(chain.replay())

    def _catch_up(
        self, ids: Int[Tensor, " m"], states: Float[Tensor, "m Dv"], start: int, gamma: int
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n Dv"]]:
        """The rows that a capture begins with, as many as a cycle adds; those before them, which
        came in the gap or while nobody drafted, are read here."""
        num_late = max(0, len(ids) - gamma - 1)
        if num_late:
            at = torch.arange(start, start + num_late, device=self.device)
            self._step(ids[:num_late], states[None, :num_late].to(self._dtype), at)
        self._start.fill_(start + num_late)
        return ids[num_late:], states[num_late:]

    def _chain(
        self, ids: Int[Tensor, " m"], states: Float[Tensor, "m Dv"], gamma: int
    ) -> list[Tensor]:
        at = self._start + torch.arange(len(ids), device=self.device)
        out = self._step(ids, states[None], at)[:, -1:]
        drafted: list[Tensor] = []
        sure: list[Tensor] = []
        rows: list[Tensor] = []
        for step in range(gamma):
            if step:
                at = at[-1:] + 1
                out = self._step(drafted[-1], out, at)
            logits = self._tables.score(out)[0]
            if self._sampling is None:
                drafted.append(logits.argmax(-1))
                sure.append(torch.softmax(logits.float(), -1).amax(-1))
            else:
                rows.append(self._sampling.probabilities(logits))
                drafted.append(draw(rows[-1], self._drawn_with[step : step + 1]))
                sure.append(rows[-1].gather(-1, drafted[-1][:, None])[:, 0])
        numbers = torch.stack([torch.cat(drafted).double(), torch.cat(sure).double()])
        return [numbers, torch.cat(rows)] if rows else [numbers]

    def _step(
        self, ids: Int[Tensor, " R"], states: Float[Tensor, "1 R Dv"], at: Int[Tensor, " R"]
    ) -> Float[Tensor, "1 R Dv"]:
        token = None
        if self._reads_token:
            token = self._twin.read_tokens(self._tables.embedding[ids][None].to(self._dtype))
        drafter = None
        if self._reader is not None:
            for some, where in zip(ids.split(READ_ROWS), at.split(READ_ROWS), strict=True):
                self._hear(self._reader.read_at(some, where), where + 1)
            drafter = self._heard[at][None]
        inputs = StepInputs(drafter, states if self._reads_verifier else None, token)
        self._rows.begin(at)
        out: Tensor = self._twin.step_at(inputs, at, self._rows)
        return out

    def _hear(self, states: Float[Tensor, "R Dd"], at: Int[Tensor, " R"]) -> None:
        """The drafter's states of these positions."""
        found = states.to(self._dtype)
        if self._twin.memory == "drafter":
            self._rows.remember(self._twin, found, at)
        else:
            self._heard.index_copy_(0, at, found)


def _left(chain: list[Tensor]) -> Unread:
    """Its numbers, and what it was drawn from, if it was."""
    return Unread(chain[0], q=chain[1] if len(chain) > 1 else None)


class CapturedHead(HeadDrafter):
    """``HeadDrafter`` whose chains are captured. They are drafted in full, for a device is no
    sooner done with less, and where they are read first verified as far as it pays."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_new_tokens: int,
        options: HeadOptions | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(head, tables, max_new_tokens, options, policy)
        assert fits_captures(head, self.options)
        self._captured = CapturedChains(head, tables, self.max_length, self.options.sampling)

    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        # A drafter on another GPU cannot be part of a graph here.
        self._is_captured = reader is None or reader.fits_capture(self._captured.device)
        if self._is_captured:
            self._captured.begin(visual, reader)
        else:
            super().begin(question, visual, reader)

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        drafted = self.unread(tokens, states, gamma)
        return super().propose(tokens, states, gamma) if drafted is None else drafted.read()

    def unread(
        self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int
    ) -> Unread | None:
        if not self._is_captured:
            return None
        start = len(tokens) - len(states)
        chances = self.chances(len(tokens), gamma)
        return self._captured.draft(tokens[start:], states, start, gamma, chances)


def head_drafter(
    head: Adapter,
    tables: VerifierTables,
    max_new_tokens: int,
    options: HeadOptions | None = None,
    policy: Policy | None = None,
) -> HeadDrafter:
    """Who drafts with a head: on a GPU by captured chains, where they are of that kind."""
    on_gpu = tables.embedding.device.type == "cuda"
    options, policy = options or HeadOptions(), policy or Policy()
    kind: type[HeadDrafter] = HeadDrafter
    if on_gpu and fits_captures(head, options):
        kind = CapturedHead
    elif on_gpu and fits_trees(head, options):
        from xsd.decoding.tree_graphs import CapturedTreeHead

        kind = CapturedTreeHead
    return kind(head, tables, max_new_tokens, options, policy)


def can_capture(head: Adapter) -> bool:
    """Whether a head drafts on without the verifier: from its own states in place of that one's,
    or from none."""
    row = head.row
    drafts_on = row.feedback or "verifier" not in row.streams
    return row.phase == "decode" and head.deployable and drafts_on


def fits_captures(head: Adapter, options: HeadOptions) -> bool:
    """Whether its chains are of the kind that ``CapturedHead`` drafts."""
    return can_capture(head) and options.tree_width == 0


def fits_trees(head: Adapter, options: HeadOptions) -> bool:
    """Whether its trees are of the kind that ``CapturedTreeHead`` grows."""
    reads_drafter = "drafter" in head.row.streams
    return can_capture(head) and bool(options.tree_width) and not reads_drafter


@dataclass(frozen=True)
class _Chain:
    """A captured chain and what it reads."""

    ids: Int[Tensor, " m"]
    states: Float[Tensor, "m Dv"]
    replay: Callable[[], list[Tensor]]


class Rows(Past):
    """A head's rows of one answer, appended where the device says; all of them are looked at,
    those beyond a row's own position through a mask."""

    def __init__(self, head: Adapter, length: int, like: Tensor) -> None:
        super().__init__([])
        config = head.config
        self.length = length
        head_dim = config.d_verifier // config.num_heads
        shape = (2, 1, config.num_heads, length, head_dim)
        self._buffers = [like.new_zeros(shape).detach() for _ in head.blocks]
        self.columns = torch.arange(length, device=like.device)
        self._remembers = head.memory == "drafter"
        if self._remembers:
            # The drafter's states run one ahead of the rows.
            ahead = (*shape[:3], length + 1, head_dim)
            self.memory = [like.new_zeros(ahead).detach() for _ in head.blocks]
            self._seen_columns = torch.arange(length + 1, device=like.device)

    def look_at(self, twin: Any, visual: Float[Tensor, "K Dv"]) -> bool:
        """Another sample's visual vectors; False where they are of another number, so that what
        was captured looks at the old ones."""
        found = [block.project_memory(visual[None]) for block in twin.blocks]
        if [x.shape for x in found] != [x.shape for x in self.memory]:
            self.memory = found
            return False
        for old, new in zip(self.memory, found, strict=True):
            old.copy_(new)
        return True

    def remember(self, twin: Any, states: Float[Tensor, "R Dd"], at: Int[Tensor, " R"]) -> None:
        """Drafter states that rows attend to, by answer position."""
        entered = twin.enter(states[None])
        for kept, block in zip(self.memory, twin.blocks, strict=True):
            kept.index_copy_(3, at, block.project_memory(entered))

    def begin(self, at: Int[Tensor, " R"]) -> None:
        self._at = at
        self.mask = self.columns <= at[:, None]
        if self._remembers:
            # A row has read its token, and so has the drafter's state behind it.
            self.memory_mask = self._seen_columns <= at[:, None] + 1

    def begin_tree(self, slots: Int[Tensor, " R"], visible: Bool[Tensor, "R length"]) -> None:
        """Rows of a draft tree: written at ``slots``, seeing what they follow."""
        self._at, self.mask = slots, visible

    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        return self._buffers[layer].index_copy_(3, self._at, new)
