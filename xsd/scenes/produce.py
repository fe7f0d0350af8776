"""Clips made in parallel and kept across runs: what all sources that write files share.

A job makes some clips of one recording. When it is done it leaves a marker with the checksum of
each file; a later run whose job has the same digest takes the files as they are. No PyTorch: every
worker would import it.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from xsd.errors import XsdError
from xsd.files import read_json, sha256_file, write_json
from xsd.scenes.events import Events, event_images, save_events
from xsd.scenes.facts import Facts
from xsd.scenes.layout import INDEX_NAME, NUM_EVENT_IMAGES, SceneRecord, index_entry
from xsd.scenes.video import write_mp4

CLIPS_A_JOB = 20
"""So much of a recording is done again after an interruption, and is one step of progress."""
_MARKERS = ".recordings"
Clip = dict[str, Any]
"""``entry`` (its row of the index), ``facts`` or None, ``num_events``, ``sha256`` by file."""


@dataclass(frozen=True)
class Job(ABC):
    """Everything that some clips' files depend on, and where they go."""

    root: Path
    num_clips: int
    """At most."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its marker: unique in the folder."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of all that decides the files, ``root`` left out."""

    @abstractmethod
    def make(self) -> list[Clip]:
        """Write the files.

        Raises:
            XsdError: a source cannot be read.
        """

    @property
    def marker(self) -> Path:
        return self.root / _MARKERS / f"{self.name}.json"


def shares(num_windows: int) -> list[tuple[int, int]]:
    """First window and number of windows of each job that cuts a part of a recording."""
    starts = range(0, num_windows, CLIPS_A_JOB)
    return [(first, min(CLIPS_A_JOB, num_windows - first)) for first in starts]


def refuse_namesakes(folder: Path, recordings: Sequence[str]) -> None:
    """Two recordings of one name would write the same files.

    Raises:
        XsdError: there are two.
    """
    twice = sorted(name for name, count in Counter(recordings).items() if count > 1)
    if twice:
        raise XsdError(f"{folder}: two recordings would be {twice[0]!r}; rename or remove one")


def produce(jobs: Sequence[Job], num_workers: int) -> Iterator[SceneRecord]:
    """The clips of all jobs, in order, made or found made.

    Raises:
        XsdError: a source cannot be read, or a process was killed.
    """
    if num_workers <= 1:
        for job in jobs:
            yield from _run(job)
        return
    # Not forked: the caller may hold threads (PyTorch) that a fork would leave locked.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"))
    try:
        for made in pool.map(_run, jobs):
            yield from made
    except BrokenProcessPool as error:
        raise XsdError("a rendering process was killed; lower num_workers and run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_clip(
    root: Path,
    recording: str,
    clip: int,
    split: str,
    events: Events,
    frames: UInt8[np.ndarray, "N H W 3"],
    facts: Mapping[str, Any] | None = None,
) -> Clip:
    """Write a clip's files at their usual places: events, both renderings, MP4.

    Raises:
        XsdError: fewer events than images.
    """
    entry = index_entry(recording, clip, split)
    images = event_images(events, NUM_EVENT_IMAGES) + event_images(events, 1)
    save_events(root / entry["event_data"], events)
    write_mp4(root / entry["mp4_data"], frames)
    names = entry["event_image"] + entry["event_image_1f"]
    for relative, image in zip(names, images, strict=True):
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / relative)
    files = [entry["event_data"], entry["mp4_data"], *names]
    sums = {relative: sha256_file(root / relative) for relative in files}
    return {"entry": entry, "facts": facts, "num_events": len(events), "sha256": sums}


def _run(job: Job) -> list[SceneRecord]:
    """Make the clips, or find them made."""
    found = _finished(job)
    if found is not None:
        return found
    # From here on an older index would name files that are being replaced.
    job.marker.unlink(missing_ok=True)
    (job.root / INDEX_NAME).unlink(missing_ok=True)
    clips = job.make()
    write_json(job.marker, {"digest": job.digest, "clips": clips})
    return [_scene_record(clip, is_reused=False) for clip in clips]


def _finished(job: Job) -> list[SceneRecord] | None:
    """The clips as an earlier run left them; None if absent, different, or damaged."""
    if not job.marker.is_file():
        return None
    marker = read_json(job.marker)
    if marker["digest"] != job.digest:
        return None
    for clip in marker["clips"]:
        for relative, digest in clip["sha256"].items():
            file = job.root / relative
            if not file.is_file() or sha256_file(file) != digest:
                return None
    return [_scene_record(clip, is_reused=True) for clip in marker["clips"]]


def _scene_record(clip: Clip, is_reused: bool) -> SceneRecord:
    facts, entry = clip["facts"], clip["entry"]
    return SceneRecord(
        entry["id"],
        entry["split"],
        Facts.from_dict(facts) if facts else None,
        entry,
        clip["num_events"],
        is_reused,
    )
