"""The processes that a launcher (``accelerate launch``, ``torchrun``) started for one command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from xsd.errors import XsdError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""Shares of hours end at different times; a process that is gone is noticed at once."""


@dataclass(frozen=True)
class Processes:
    """Its members meet in the calls below, all of them in the same order."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    @contextmanager
    def launched(cls, device: str) -> Iterator[Processes]:
        """All processes of the launch that this one belongs to; alone, where there was none.

        Args:
            device: ``cpu``, or ``auto``: then each has the GPU of its rank on its host.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        import torch.distributed
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        # Objects travel through host memory, whatever the devices talk through.
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            yield cls(state.process_index, state.num_processes, group)
        finally:
            # Threads that still wait for the others would abort a process that exits.
            state.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this one has the run, the index and the terminal."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items, when all divide the same ones among them."""
        return items[self.rank :: self.count]

    def tell(self, value: T) -> T:
        """The main process's value, in all of them.

        Raises:
            XsdError: a process is gone.
        """
        import torch.distributed

        if self.count == 1:
            return value
        box = [value]
        try:
            torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            raise _lost(error) from error
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, in all of them.

        Raises:
            XsdError: a process is gone.
        """
        import torch.distributed

        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise _lost(error) from error
        return values


def lead_or_serve(
    device: str,
    lead: Callable[[Processes], object],
    serve: Callable[[Any, Processes], object],
) -> None:
    """Run a command in all processes of its launch.

    Args:
        lead: what the main one does; it tells the others their tasks.
        serve: what the others do with each, until the main one is done.
    """
    with Processes.launched(device) as processes:
        if processes.is_main:
            lead(processes)
            processes.tell(None)
            return
        nothing: Any = None
        while (task := processes.tell(nothing)) is not None:
            serve(task, processes)


def _lost(error: RuntimeError) -> XsdError:
    return XsdError(
        "a process of this launch is gone; run the same command again, it goes on from there "
        f"({str(error).splitlines()[0][:120]})"
    )
