"""Coupled drafting on a GPU: a step of drafter, adapter and LM head is one CUDA graph.

Launched one by one, its kernels would keep the interpreter from the verifier's thread, which
launches beside it, and a draft would take the host longer than the device.
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
from xsd.decoding.draft import DrafterReader, VerifierTables
from xsd.decoding.graphs import MAX_FRESH, Rows
from xsd.pairs.capture import Capture, Lane
from xsd.pairs.device import to_device


@dataclass(frozen=True)
class _Step:
    """A captured step and what it reads."""

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
        self._steps: dict[int, _Step] = {}

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
        while count and not self.is_done:
            if self._num_rows == 0:
                # The row at position 0 has read the prompt alone.
                guess = self._guess((), 0)
                self._num_rows = 1
            if self.tokens:
                guess = self._guess(self.tokens[self._num_rows - 1 :], self._num_rows - 1)
            # Tokens that are here already came with the rows that they need.
            sure, token = guess.tolist()
            self.tokens.append(int(token))
            self.confidence.append(sure)
            self._num_rows = len(self.tokens)
            count -= 1

    def _guess(self, ids: Sequence[int], start: int) -> Float[Tensor, " 2"]:
        """What follows these tokens, the first of which stands at ``start``; none: the prompt.

        Its probability and its id, which float32 holds exactly: both are read in one go.
        """
        self._start.fill_(start)
        self._reader.check_room(start + len(ids))
        given = to_device(list(ids), self._start.device).long()
        if len(ids) > MAX_FRESH:
            return self._step(given)
        step = self._steps.get(len(ids))
        if step is None:
            read = given.clone()
            capture = Capture(lambda: self._step(read), self._lane)
            step = self._steps[len(ids)] = _Step(read, capture.replay)
        else:
            step.ids.copy_(given, non_blocking=True)
        return step.replay()

    def _step(self, ids: Int[Tensor, " m"]) -> Float[Tensor, " 2"]:
        if not len(ids):
            return self._adapt(self._first, self._start)
        at = self._start + torch.arange(len(ids), device=self._start.device)
        parts = zip(ids.split(MAX_FRESH), at.split(MAX_FRESH), strict=True)
        states = torch.cat([self._reader.read_at(some, where) for some, where in parts])
        return self._adapt(states, at + 1)

    def _adapt(self, states: Float[Tensor, "m Dd"], at: Int[Tensor, " m"]) -> Float[Tensor, " 2"]:
        """The token that the last of the rows at ``at`` expects."""
        self._rows.begin(at)
        inputs = StepInputs(states[None].to(self._dtype))
        out: Tensor = self._twin.step_at(inputs, at, self._rows)
        best, index = self._tables.score(out[:, -1])[0].float().softmax(-1).max(-1)
        return torch.stack((best, index.float()))


def coupled_drafter(
    reader: DrafterReader, adapter: Adapter, tables: VerifierTables, max_length: int
) -> CoupledDrafter:
    """Who drafts coupled: on a GPU by captured steps, where drafter and adapter lie on one."""
    device = next(adapter.parameters()).device
    fits = device.type == "cuda" and reader.fits_capture(device)
    kind = CapturedCoupled if fits else CoupledDrafter
    return kind(reader, adapter, tables, max_length)
