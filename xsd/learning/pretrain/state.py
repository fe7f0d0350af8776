"""How far the pretraining of one model has come: phase, step, weights and moments, in one file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from xsd.learning.state import put_back, read_state, tensors_of, write_state

PHASES = ("facts", "gathering", "language", "grown")
_STATE_SECONDS, _STATE_SHARE = 20.0, 0.02
"""A state is written no more often than that, and takes no more than this share of the time."""


class Progress:
    """The phases of one model; those that are finished are skipped.

    What a step trains on is a function of seed and step alone, so no generator's state is kept.
    """

    def __init__(self, path: Path | None, key: str, model: nn.Module) -> None:
        """
        Args:
            path: the file; None: nothing is kept. If it exists, the model gets its weights.
            key: of the configuration that may go on from it.

        Raises:
            XsdError: the file is unreadable, or another configuration's.
        """
        self._path, self._key, self._model = path, key, model
        self._phase, self._step = PHASES[0], 0
        self._saved: dict[str, Tensor] = {}
        self._at, self._took = time.monotonic(), 0.0
        if path is None or not path.exists():
            return
        told, self._saved = read_state(path, key)
        self._phase, self._step = str(told["phase"]), int(told["step"])
        with torch.no_grad():
            # While it is shallow a model has fewer layers: the others are as they began.
            for name, parameter in model.named_parameters():
                if (x := self._saved.get(f"weight.model.{name}")) is not None:
                    parameter.copy_(x)

    def is_past(self, phase: str) -> bool:
        """Whether nothing of a phase is left to do."""
        return PHASES.index(phase) < PHASES.index(self._phase)

    def begin(
        self,
        phase: str,
        aid: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        running: Tensor,
    ) -> int:
        """A phase begins; where the file is of this phase, all goes on from there.

        Args:
            aid: trained beside the model, and dropped in the end.
            running: the sum or mean of losses that the next report tells; changed in place.

        Returns:
            Steps of the phase that are done.
        """
        self._trained = nn.ModuleDict({"model": self._model, "aid": aid})
        self._optimizers, self._running = optimizers, running
        done = self._step if phase == self._phase and self._saved else 0
        if done:
            put_back(self._saved, self._trained, optimizers)
            running.copy_(self._saved["running"])
        elif self.is_past(phase):
            raise AssertionError(f"{phase} is finished")
        self._saved, self._phase, self._step = {}, phase, done
        return done

    def stepped(self) -> None:
        """One more step is done."""
        self._step += 1
        if time.monotonic() - self._at > max(_STATE_SECONDS, self._took / _STATE_SHARE):
            self.save()

    def save(self) -> None:
        """Write the state now."""
        if self._path is None:
            return
        started = time.monotonic()
        tensors = tensors_of(self._trained, self._optimizers) | {"running": self._running}
        told = {"phase": self._phase, "step": self._step}
        write_state(self._path, told, tensors, self._key)
        self._at = time.monotonic()
        self._took = self._at - started
