"""Writing an extraction so that a kill at any moment loses the batch in hand at most.

Every batch lands as a part before the next one is begun. A thread turns the parts of a full chunk
into the chunk, then lets the index name it, then removes the parts. What is found after a kill is
therefore an index that is true, and parts, from which the next run goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from xsd.clock import PartTimes
from xsd.errors import XsdError
from xsd.files import atomic_path, make_folder, sha256_file, sync
from xsd.hidden.chunk import Chunk, write_chunk
from xsd.hidden.index import (
    CHUNKS,
    INDEX,
    VISUAL,
    ChunkEntry,
    Header,
    Index,
    SampleEntry,
    VisualEntry,
    load_index,
)
from xsd.hidden.parts import Part, Parts
from xsd.hidden.plan import Batch, Extracted

_WAITING = 4
"""Stored batches that the thread may be behind."""


class HiddenWriter:
    """Adds batches to a folder; the one process that makes chunks of them."""

    def __init__(self, folder: Path, index: Index, plan: Sequence[Batch]) -> None:
        self.folder = folder
        self.index = index
        self.parts = Parts(folder, index.header)
        self.times = PartTimes(torch.device("cpu"))
        """Of the background: "chunks"."""
        self._plan = plan
        self._thread = ThreadPoolExecutor(1, "xsd-writer")
        self._waiting: list[Future[None]] = []
        found = {
            number: part
            for number in range(index.num_batches, len(plan))
            if (part := self.parts.read(number, verify=True)) is not None
        }
        for number in range(index.num_batches, len(plan)):
            # Damaged, or of another extraction: it must not be taken for a finished one.
            if number not in found:
                self.parts.path(number).unlink(missing_ok=True)
        self.missing = tuple(n for n in range(index.num_batches, len(plan)) if n not in found)
        """Batches that are to be answered, by their numbers in the plan."""
        self.failures = index.failures + tuple(f for part in found.values() for f in part.failures)
        """Of all that is stored by this process or was before."""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, header: Header, plan: Sequence[Batch]) -> Iterator[HiddenWriter]:
        """Begin, or go on where an earlier run stopped; one process at a time.

        On leaving, what is complete has become chunks.

        Raises:
            XsdError: the folder cannot be made, holds an extraction of another configuration, or
                is being written.
        """
        make_folder(folder)
        try:
            with FileLock(folder / ".lock", timeout=0):
                # Of ours, and of the library's own writing within.
                for leftover in (*folder.rglob(".*.tmp*"), *folder.rglob(".tmp*")):
                    leftover.unlink()
                writer = cls(folder, _begin(folder, header), plan)
                try:
                    yield writer
                    writer.finish()
                finally:
                    writer._thread.shutdown(cancel_futures=True)
        except Timeout as error:
            raise XsdError(f"{folder}: another process is writing it; wait, or end that") from error

    def add(self, number: int, extracted: Extracted) -> None:
        """Keep batch ``number`` of the plan.

        Raises:
            Whatever kept the thread from writing.
        """
        assert extracted.batch == self._plan[number], "a batch is kept under its own number"
        part = self.parts.write(number, extracted)
        self.failures += part.failures
        self._waiting.append(self._thread.submit(self._settle, part))
        while len(self._waiting) > _WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.pop(0).result()

    def finish(self) -> None:
        """Wait until everything stored, by whichever process, is in chunks as far as can be.

        Raises:
            Whatever kept the thread from writing.
        """
        for waiting in self._waiting:
            waiting.result()
        self._waiting.clear()
        self._commit_full()

    def _settle(self, part: Part) -> None:
        with self.times.part("chunks"):
            if part.path.exists():
                sync(part.path)
            self._commit_full()

    def _commit_full(self) -> None:
        """Chunks come in the order of the plan, so the index depends on nothing else."""
        while not self.index.complete:
            chunk = self._plan[self.index.num_batches].chunk
            numbers = [n for n, batch in enumerate(self._plan) if batch.chunk == chunk]
            if not all(self.parts.path(number).is_file() for number in numbers):
                return
            self._commit(chunk, numbers)
        shutil.rmtree(self.parts.folder, ignore_errors=True)

    def _commit(self, number: int, batches: Sequence[int]) -> None:
        """Parts to a chunk; the index is what makes it count."""
        parts = [self._part(batch) for batch in batches]
        start = sum(len(batch.samples) for batch in self._plan if batch.chunk < number)
        chunks, visuals = self.index.chunks, self.index.visual
        loaded = [part.load() for part in parts]
        if answered := [chunk for chunk, _ in loaded if chunk is not None]:
            suffix = "pt" if self.index.header.chunk_format == "pt" else "safetensors"
            path = self.folder / CHUNKS / f"chunk_{start:06d}.{suffix}"
            chunk = Chunk.cat(answered)
            write_chunk(chunk, path)
            keys = [key for part in parts for key in part.keys]
            chunks += (self._chunk_entry(path, batches, keys, chunk),)
        states = [visual for _, visual in loaded if visual]
        if states and self.index.header.chunk_format != "pt":
            path = self.folder / VISUAL / f"visual_{start:06d}.safetensors"
            write_visual({kind: torch.cat([s[kind] for s in states]) for kind in states[0]}, path)
            scenes = tuple(scene for part in parts for scene in part.scenes)
            visuals += (VisualEntry(path.name, scenes, *size_and_digest(path)),)
        num_batches = self.index.num_batches + len(batches)
        self.index = replace(
            self.index,
            chunks=chunks,
            visual=visuals,
            failures=self.index.failures + tuple(f for part in parts for f in part.failures),
            num_batches=num_batches,
            complete=num_batches == len(self._plan),
        )
        self.index.save(self.folder)
        for part in parts:
            part.path.unlink()

    def _part(self, number: int) -> Part:
        part = self.parts.read(number, verify=False)
        if part is None:
            raise XsdError(f"{self.parts.path(number)}: not of this extraction; extract again")
        return part

    def _chunk_entry(
        self, path: Path, batches: Sequence[int], keys: Sequence[str], chunk: Chunk
    ) -> ChunkEntry:
        asked = [sample for number in batches for sample in self._plan[number].samples]
        splits = {sample.key: sample.scene.split for sample in asked}
        entries = tuple(
            SampleEntry(key, splits[key], *both)
            for key, both in zip(keys, chunk.lengths(), strict=True)
        )
        return ChunkEntry(path.name, self.index.num_samples, entries, *size_and_digest(path))


def _begin(folder: Path, header: Header) -> Index:
    """The folder's index, or a new one.

    An index comes first, so that a folder tells whose it is from the first batch on.
    """
    if not (folder / INDEX).exists():
        Index(header).save(folder)
    index = load_index(folder)
    # Compared as JSON: that is how the stored one was read.
    old, new = (json.loads(json.dumps(asdict(h))) for h in (index.header, header))
    different = [name for name in new if new[name] != old[name]]
    if different:
        name = different[0]
        change = f": {old[name]!r}, not {new[name]!r}" if isinstance(new[name], str | int) else ""
        raise XsdError(
            f"{folder}: holds an extraction with another {name}{change}; "
            "give another --output_dir, or remove the folder"
        )
    return index


def write_visual(states: dict[str, Tensor], path: Path) -> None:
    """Visual states by kind [clips, K, Dv], atomic."""
    with atomic_path(path) as temporary:
        save_file(states, temporary)


def size_and_digest(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a file, as an index holds them."""
    return path.stat().st_size, sha256_file(path)
