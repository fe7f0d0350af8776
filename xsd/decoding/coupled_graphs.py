"""Coupled drafting on a GPU: drafter, adapter and LM head in turn, so many steps in a CUDA graph.

Launched one by one, their kernels would keep the interpreter from the verifier's thread, which
launches beside it, and a draft would take the host longer than the device. What one step expects
the next one reads on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.live import bind
from xsd.adapters.rows import StepInputs
from xsd.decoding.ahead import CoupledDrafter
from xsd.decoding.graphs import READ_ROWS, Rows
from xsd.decoding.reader import DrafterReader
from xsd.decoding.tables import VerifierTables
from xsd.decoding.unread import Unread
from xsd.pairs.capture import Capture, Lane
from xsd.pairs.device import to_device


@dataclass(frozen=True)
class _Steps:
    """Captured steps and what they read."""

    ids: Int[Tensor, " m"]
    replay: Callable[[], Tensor]


class CapturedCoupled(CoupledDrafter):
    """``CoupledDrafter`` whose steps are captured."""

    def __init__(
        self, reader: DrafterReader, adapter: Adapter, tables: VerifierTables, max_length: int
    ) -> None:
        super().__init__(reader, adapter, tables, max_length)
        adapter.check_length(max_length)
        like = next(adapter.parameters())
        self._twin = bind(adapter)
        self._rows = Rows(adapter, max_length, like)
        self._start = torch.zeros(1, dtype=torch.long, device=like.device)
        self._lane = Lane(like.device)
        self._steps: dict[tuple[int, int], _Steps] = {}

    @torch.inference_mode()
    def begin(self, visual: Float[Tensor, "K Dv"] | None) -> None:
        self.tokens, self.confidence = [], []
        self._num_rows = 0
        self._first = self._reader.begin_at()
        if self._twin.memory == "visual":
            assert visual is not None, "the adapter attends to visual states"
            if not self._rows.look_at(self._twin, visual.to(self._dtype)):
                self._steps.clear()

    @torch.inference_mode()
    def extend(self, count: int) -> None:
        count = min(count, self.max_length - len(self.tokens))
        if count <= 0 or self.is_done:
            return
        ids, sure = self._drafted(count).tolist()
        found = [int(token) for token in ids]
        ends = (i for i, token in enumerate(found, start=1) if token in self._tables.eos_ids)
        size = next(ends, count)
        self.tokens += found[:size]
        self.confidence += sure[:size]
        self._num_rows = len(self.tokens)

    @torch.inference_mode()
    def unread(self, num_said: int, count: int) -> Unread | None:
        start, end = num_said, num_said + count
        if len(self.tokens) >= end or self.is_done:
            return None
        known = [self.tokens[start:], self.confidence[start:]]
        numbers = self._drafted(end - len(self.tokens))
        if known[0]:
            before = to_device(known, numbers.device).double()
            numbers = torch.cat([before, numbers], dim=1)
        return Unread(numbers)

    def _drafted(self, count: int) -> Float[Tensor, "2 count"]:
        """What follows all tokens, with its probability, left on the device."""
        first = min(self._num_rows, len(self.tokens))
        if self.tokens and first == 0:
            # The row at position 0 has read the prompt alone.
            self._follow((), 0, 1)
            first = 1
        # One row for what follows; those of drafts that nobody reads are made anew.
        self._num_rows = len(self.tokens) + 1
        if not self.tokens:
            return self._follow((), 0, count)
        return self._follow(self.tokens[first - 1 :], first - 1, count)

    def _follow(self, ids: Sequence[int], start: int, count: int) -> Float[Tensor, "2 count"]:
        """What follows these tokens, the first of which stands at ``start``; none: the prompt."""
        self._reader.check_room(start + len(ids) + count - 1)
        given = to_device(list(ids), self._start.device).long()
        # A capture begins with as many rows as a cycle adds; those of a rest are read here.
        num_late = max(0, len(ids) - READ_ROWS)
        if num_late:
            at = torch.arange(start, start + num_late, device=given.device)
            self._step(given[:num_late], at)
            given = given[num_late:]
        self._start.fill_(start + num_late)
        steps = self._steps.get((len(given), count))
        if steps is None:
            read = given.clone()
            capture = Capture(lambda: self._steps_behind(read, count), self._lane)
            steps = self._steps[len(given), count] = _Steps(read, capture.replay)
        else:
            steps.ids.copy_(given, non_blocking=True)
        return steps.replay()

    def _steps_behind(self, ids: Int[Tensor, " m"], count: int) -> Float[Tensor, "2 count"]:
        at = self._start - 1
        if len(ids):
            at = self._start + torch.arange(len(ids), device=self._start.device)
            guesses = [self._step(ids, at)]
        else:
            guesses = [self._adapt(self._first, self._start)]
        for _ in range(count - 1):
            at = at[-1:] + 1
            guesses.append(self._step(guesses[-1][0].long(), at))
        return torch.cat(guesses, dim=1)

    def _step(self, ids: Int[Tensor, " m"], at: Int[Tensor, " m"]) -> Float[Tensor, "2 1"]:
        parts = zip(ids.split(READ_ROWS), at.split(READ_ROWS), strict=True)
        states = torch.cat([self._reader.read_at(some, where) for some, where in parts])
        return self._adapt(states, at + 1)

    def _adapt(self, states: Float[Tensor, "m Dd"], at: Int[Tensor, " m"]) -> Float[Tensor, "2 1"]:
        """The token that the last of the rows at ``at`` expects, and how probable it is."""
        self._rows.begin(at)
        inputs = StepInputs(states[None].to(self._dtype))
        out: Tensor = self._twin.step_at(inputs, at, self._rows)
        best, index = self._tables.score(out[:, -1]).float().softmax(-1).max(-1)
        return torch.stack([index.double(), best.double()])


def coupled_drafter(
    reader: DrafterReader, adapter: Adapter, tables: VerifierTables, max_length: int
) -> CoupledDrafter:
    """Who drafts coupled: on a GPU by captured steps, where drafter and adapter lie on one."""
    device = next(adapter.parameters()).device
    fits = device.type == "cuda" and reader.fits_capture(device)
    kind = CapturedCoupled if fits else CoupledDrafter
    return kind(reader, adapter, tables, max_length)
