"""What an evaluation has counted so far, a line a batch: a kill costs the batch in hand."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsd.counts import Counts
from xsd.files import make_folder
from xsd.metrics import Scored

_RUNS = "runs"
"""Names the run of every evaluation that kept counts here."""


@dataclass(frozen=True)
class Journal:
    """A hidden folder with a file a process; any number of processes may go on from it.

    Batches are known by their number among all of the evaluation. Each line carries the sha256 of
    its content, so what a dying machine wrote by half, or the disk lost, is scored again.
    """

    folder: Path
    """Named by what decides the counts: nobody else's are found in it."""

    def begin(self, run_id: str, has_finished: Callable[[Sequence[str]], bool]) -> None:
        """Go on for this run behind what interrupted ones kept.

        What one that finished left, killed before it could remove it, is nobody's to take.

        Args:
            has_finished: whether any of the runs of these ids ended well.
        """
        runs = self.folder / _RUNS
        earlier = runs.read_text().split() if runs.is_file() else []
        if self.folder.exists() and (not earlier or has_finished(earlier)):
            self.remove()
        make_folder(self.folder)
        with runs.open("a") as file:
            file.write(f"\n{run_id}\n")

    def read(self) -> dict[int, Scored]:
        """Number of every batch that is whole here, and what was counted of it."""
        found: dict[int, Scored] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                digest, _, content = line.partition(b" ")
                if digest == _digest(content):
                    number, values = json.loads(content)
                    found[number] = _scored(values)
        return found

    @contextmanager
    def writing(self, rank: int) -> Iterator[Callable[[int, Scored], None]]:
        """A function that keeps a batch, for the process of that rank.

        Nobody waits for the disk: that survives the death of the process, not of the machine.
        """
        make_folder(self.folder)
        with (self.folder / f"{rank}.jsonl").open("ab", buffering=0) as file:

            def keep(number: int, scored: Scored) -> None:
                content = json.dumps([number, scored], default=vars).encode()
                # A line begins anew, so that one cut short harms no other.
                file.write(b"\n" + _digest(content) + b" " + content + b"\n")

            yield keep

    def remove(self) -> None:
        """The evaluation is finished.

        Counts go first: none must be found without the names of their runs.
        """
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _scored(values: Mapping[str, Any]) -> Scored:
    return Scored(Counts.parse(values["counts"]), tuple(values["accepted"]))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
