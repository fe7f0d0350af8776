"""Writing an extraction so that a kill at any moment loses one batch at most.

Every batch lands as a part, in a hidden folder. When a chunk's parts are complete they become the
chunk, then the index names it, then the parts go. What is found after a kill is therefore an index
that is true, and perhaps the parts of one chunk, from which the next run goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xsd.errors import XsdError
from xsd.files import atomic_path, sha256_file, sha256_json
from xsd.hidden.chunk import Chunk, write_chunk
from xsd.hidden.index import (
    CHUNKS,
    INDEX,
    VISUAL,
    ChunkEntry,
    Failure,
    Header,
    Index,
    SampleEntry,
    VisualEntry,
    load_index,
)
from xsd.hidden.plan import Batch, Extracted
from xsd.hidden.store import DTYPES
from xsd.types import HiddenSample

PARTS = ".parts"
_KINDS = ("projected", "prefilled")


@dataclass(frozen=True, slots=True)
class _Part:
    """A stored batch that is not in a chunk yet; its tensors stay on disk."""

    path: Path
    keys: tuple[str, ...]
    scenes: tuple[str, ...]
    failures: tuple[Failure, ...]


class HiddenWriter:
    """Adds batches to a folder, in the order of the plan."""

    def __init__(self, folder: Path, index: Index, plan: Sequence[Batch]) -> None:
        self.folder = folder
        self.index = index
        self._plan = plan
        self._identity = sha256_json(asdict(index.header))
        self._parts: list[_Part] = []
        while (part := self._read_part(self.num_stored)) is not None:
            self._take(part)
        if self.index.complete:
            shutil.rmtree(folder / PARTS, ignore_errors=True)

    @classmethod
    @contextmanager
    def open(cls, folder: Path, header: Header, plan: Sequence[Batch]) -> Iterator[HiddenWriter]:
        """Begin, or go on where an earlier run stopped; one process at a time.

        Raises:
            XsdError: the folder holds an extraction of another configuration, or is being written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                for leftover in folder.rglob(".*.tmp*"):
                    leftover.unlink()
                yield cls(folder, _begin(folder, header), plan)
        except Timeout as error:
            raise XsdError(f"{folder}: another process is writing it; wait, or end that") from error

    @property
    def num_stored(self) -> int:
        """Batches of the plan that need not be answered again."""
        return self.index.num_batches + len(self._parts)

    @property
    def failures(self) -> tuple[Failure, ...]:
        return self.index.failures + tuple(f for part in self._parts for f in part.failures)

    def add(self, extracted: Extracted) -> None:
        """Keep the next batch of the plan; the last one completes the index."""
        number = self.num_stored
        assert extracted.batch == self._plan[number], "batches come in the order of the plan"
        self._write_part(number, extracted)
        part = self._read_part(number)
        assert part is not None, f"batch {number} was just written"
        self._take(part)

    def _take(self, part: _Part) -> None:
        batch = self._plan[self.num_stored]
        self._parts.append(part)
        if batch.is_last:
            self._commit(batch.chunk)

    def _part_path(self, number: int) -> Path:
        return self.folder / PARTS / f"part_{number:06d}.safetensors"

    def _write_part(self, number: int, extracted: Extracted) -> None:
        tensors: dict[str, Tensor] = {}
        if extracted.samples:
            tensors |= Chunk.of(extracted.samples, DTYPES[self.index.header.dtype]).tensors()
        for kind in _KINDS if extracted.visuals else ():
            states = torch.stack([getattr(visual, kind) for visual in extracted.visuals])
            tensors[kind] = states.to(DTYPES[self.index.header.dtype])
        about = {
            "identity": self._identity,
            "keys": [sample.key for sample in extracted.samples],
            "scenes": [visual.scene_key for visual in extracted.visuals],
            "failures": [asdict(failure) for failure in extracted.failures],
        }
        with atomic_path(self._part_path(number)) as temporary:
            save_file(tensors, temporary, metadata={"xsd": json.dumps(about)})

    def _read_part(self, number: int) -> _Part | None:
        """The part, if it is there, whole, and of this extraction."""
        path = self._part_path(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("xsd", "{}"))
        except (OSError, SafetensorError, json.JSONDecodeError):
            return None
        if about.get("identity") != self._identity:
            return None
        failures = tuple(Failure(**failure) for failure in about["failures"])
        return _Part(path, tuple(about["keys"]), tuple(about["scenes"]), failures)

    def _commit(self, number: int) -> None:
        """Parts to a chunk; the index is what makes it count."""
        planned = [batch for batch in self._plan if batch.chunk == number]
        splits = {sample.key: sample.scene.split for batch in planned for sample in batch.samples}
        start = sum(len(batch.samples) for batch in self._plan if batch.chunk < number)
        chunks, visuals = self.index.chunks, self.index.visual
        samples, states = self._load_parts()
        if samples:
            suffix = "pt" if self.index.header.chunk_format == "pt" else "safetensors"
            path = self.folder / CHUNKS / f"chunk_{start:06d}.{suffix}"
            write_chunk(Chunk.of(samples, DTYPES[self.index.header.dtype]), path)
            entries = tuple(
                SampleEntry(s.key, splits[s.key], len(s.drafter_ids), len(s.verifier_ids))
                for s in samples
            )
            stored = self.index.num_samples
            chunks += (ChunkEntry(path.name, stored, entries, *_size_and_digest(path)),)
        if states and self.index.header.chunk_format != "pt":
            path = self.folder / VISUAL / f"visual_{start:06d}.safetensors"
            with atomic_path(path) as temporary:
                save_file(states, temporary)
            scenes = tuple(scene for part in self._parts for scene in part.scenes)
            visuals += (VisualEntry(path.name, scenes, *_size_and_digest(path)),)
        self.index = replace(
            self.index,
            chunks=chunks,
            visual=visuals,
            failures=self.failures,
            num_batches=self.num_stored,
            complete=self.num_stored == len(self._plan),
        )
        self.index.save(self.folder)
        shutil.rmtree(self.folder / PARTS)
        self._parts.clear()

    def _load_parts(self) -> tuple[list[HiddenSample], dict[str, Tensor]]:
        samples: list[HiddenSample] = []
        states: dict[str, list[Tensor]] = {kind: [] for kind in _KINDS}
        for part in self._parts:
            tensors = load_file(part.path)
            if part.keys:
                chunk = Chunk.from_tensors(tensors)
                samples += [chunk.sample(row, key) for row, key in enumerate(part.keys)]
            for kind in _KINDS if part.scenes else ():
                states[kind].append(tensors[kind])
        return samples, {kind: torch.cat(rows) for kind, rows in states.items() if rows}


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


def _size_and_digest(path: Path) -> tuple[int, str]:
    return path.stat().st_size, sha256_file(path)
