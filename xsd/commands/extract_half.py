"""One half of an extraction, by any number of processes.

Batches are numbered by the plan. The main process looks which are missing and tells the others;
each answers its share of them and leaves parts, and the main one makes chunks of all parts. What
a lost process has not stored is missing again at the next run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xsd.commands.processes import Processes
from xsd.commands.progress import progress
from xsd.errors import XsdError
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import clips_together, extract, header
from xsd.hidden.index import Failure, Half
from xsd.hidden.parts import Parts
from xsd.hidden.plan import Extracted, plan_batches
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import ModelPair
from xsd.scenes.dsec import load_index

_ToDo = tuple[tuple[int, ...], tuple[Failure, ...]]
"""Batches that are missing, and what has failed so far."""
_UNKNOWN: _ToDo = ((), ())


@dataclass(frozen=True)
class Task:
    """What all processes must know of a half."""

    folder: Path
    half: Half
    dataset: Path
    data: str
    """Digest of the scenes."""
    said: Path | None
    """An extraction that holds the verifier's side."""


@dataclass
class Totals:
    """What a process did."""

    num_answers: int = 0
    num_halvings: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By part of the work; "all" is the wall clock."""

    def add(self, extracted: Extracted) -> None:
        self.num_answers += len(extracted.samples)
        self.num_halvings += extracted.num_halvings
        self.add_seconds(extracted.seconds)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        for name, number in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + number


def extract_half(
    task: Task, pair: ModelPair, config: ExtractConfig, processes: Processes
) -> list[Totals]:
    """Called by every process of a launch with the same task.

    Returns:
        What each of them did.

    Raises:
        XsdError: too many answers failed, a process is gone, or the folder holds something else.
    """
    scenes = load_index(task.dataset)
    batches = plan_batches(scenes, task.half, config, clips_together(pair, config))
    total = sum(len(batch.samples) for batch in batches)
    top = header(pair, batches, task.half, config, task.data)
    said = None if task.said is None else HiddenStore.open(task.said)

    def answer(
        missing: Sequence[int],
        failures: Sequence[Failure],
        add: Callable[[int, Extracted], object],
    ) -> Totals:
        share, totals, start = processes.share(missing), Totals(), time.monotonic()
        mine = [batches[number] for number in share]
        found = list(failures)
        _refuse_too_many(found, total, config.max_failures)
        done = total - sum(len(batches[number].samples) for number in missing)
        to_do = done + sum(len(batch.samples) for batch in mine)
        with progress(f"extract {task.half}", to_do, "answers", initial=done) as bar:
            for number, extracted in zip(share, extract(pair, mine, config, said), strict=True):
                found += extracted.failures
                # Before it is stored: what was mended is then answered at the next run.
                _refuse_too_many(found, total, config.max_failures)
                add(number, extracted)
                totals.add(extracted)
                bar.update(len(extracted.batch.samples))
        totals.seconds["all"] = time.monotonic() - start
        return totals

    if not processes.is_main:
        parts = Parts(task.folder, top)
        return processes.gather(answer(*processes.tell(_UNKNOWN), parts.write))
    with HiddenWriter.open(task.folder, top, batches) as writer:
        to_do = processes.tell((writer.missing, writer.failures))
        found = processes.gather(answer(*to_do, writer.add))
        writer.finish()
        _refuse_too_many(writer.index.failures, total, config.max_failures)
        found[0].add_seconds(writer.times.seconds)
        return found


def _refuse_too_many(failures: Sequence[Failure], total: int, share: float) -> None:
    if len(failures) > math.floor(share * total):
        raise XsdError(
            f"{len(failures)} of {total} answers failed, more than --max_failures {share} allows; "
            f"the last: {failures[-1].key}: {failures[-1].reason}"
        )
