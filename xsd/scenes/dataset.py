"""Scenes written to disk in the data set's layout. No PyTorch: every worker would import it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xsd.errors import XsdError
from xsd.files import read_json, sha256_file, sha256_json, write_json
from xsd.scenes.config import EventCameraConfig, ScenesConfig
from xsd.scenes.events import event_images, save_events
from xsd.scenes.facts import ROADSIDES, TIMES, Facts
from xsd.scenes.layout import FACTS_NAME, INDEX_NAME, NUM_EVENT_IMAGES, SceneRecord, index_entry
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.synthetic import make_scene, sample_facts
from xsd.scenes.video import write_mp4

RENDERER = 1
"""Raised whenever the same seed gives another picture: older recordings are then made anew."""
_SPLITS = ("train", "val", "test")
_MARKERS = ".recordings"

Answer = Callable[[Facts, int], str]
"""The reference answer to question k about a scene with these facts."""


@dataclass(frozen=True)
class _Plan:
    """One recording to be made: everything its files depend on, and where they go."""

    root: Path
    split: str
    number: int
    num_clips: int
    size: int
    seed: int
    event_camera: EventCameraConfig

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:04d}"

    @property
    def marker(self) -> Path:
        return self.root / _MARKERS / f"{self.name}.json"

    @property
    def digest(self) -> str:
        return sha256_json({**asdict(self), "root": None, "renderer": RENDERER})


def make_scenes(config: ScenesConfig, answer: Answer | None = None) -> Iterator[SceneRecord]:
    """Write synthetic scenes, or index a prepared folder, and yield every scene.

    Synthetic files depend on the configuration only, not on the number of workers; complete
    recordings of an earlier run are kept. The index is written after the last record was taken: a
    folder without index is unfinished.

    Args:
        answer: fills the conversations of synthetic scenes; None leaves them empty.

    Raises:
        XsdError: the configuration cannot be met.
    """
    if config.source == "prepared":
        from xsd.scenes.prepared import index_prepared

        yield from index_prepared(config.dataset_dir)
        return
    plans = _plans(config)
    root = config.output_dir
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XsdError(
            f"{root}: cannot be made ({error.strerror}); choose another output_dir"
        ) from error
    records = []
    for record in _produce(plans, config.num_workers):
        records.append(record)
        yield record
    facts = {record.key: record.facts for record in records if record.facts}
    write_json(root / FACTS_NAME, {key: value.as_dict() for key, value in facts.items()})
    entries = [{**r.entry, "conversations": _conversations(facts[r.key], answer)} for r in records]
    write_json(root / INDEX_NAME, entries)


def _plans(config: ScenesConfig) -> list[_Plan]:
    if config.source != "synthetic":
        raise XsdError(
            f"source {config.source!r} is not supported; choose 'synthetic' or 'prepared'"
        )
    per = config.clips_per_recording
    if per < 1 or config.size < 32 or config.size % 2:
        raise XsdError("clips_per_recording must be at least 1, and size even and at least 32")
    if config.seed < 0 or config.event_camera.num_subframes < 2:
        raise XsdError("seed must not be negative, and num_subframes at least 2")
    counts = (config.num_train, config.num_val, config.num_test)
    if min(counts) < 0 or not sum(counts):
        raise XsdError("num_train, num_val and num_test must not be negative, nor all zero")
    return [
        _Plan(
            config.output_dir,
            split,
            start // per,
            min(per, count - start),
            config.size,
            config.seed,
            config.event_camera,
        )
        for split, count in zip(_SPLITS, counts, strict=True)
        for start in range(0, count, per)
    ]


def _produce(plans: list[_Plan], num_workers: int) -> Iterator[SceneRecord]:
    if num_workers <= 1:
        for plan in plans:
            yield from _record(plan)
        return
    # Not forked: the caller may hold threads (PyTorch) that a fork would leave locked.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"))
    try:
        for made in pool.map(_record, plans):
            yield from made
    except BrokenProcessPool as error:
        raise XsdError("a rendering process was killed; lower num_workers and run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _record(plan: _Plan) -> list[SceneRecord]:
    """Make one recording, or find it made."""
    found = _finished(plan)
    if found is not None:
        return found
    # From here on an older index would name files that are being replaced.
    plan.marker.unlink(missing_ok=True)
    (plan.root / INDEX_NAME).unlink(missing_ok=True)
    split = _SPLITS.index(plan.split)
    rng = np.random.default_rng([plan.seed, split, plan.number])
    shared = _shared_facts(plan, split, rng)
    appearance = int(rng.integers(1 << 16))
    clips = []
    for clip in range(plan.num_clips):
        facts = sample_facts(rng, shared)
        seed = int(rng.integers(1 << 62))
        clips.append(_write_clip(plan, clip, facts, seed, appearance))
    write_json(plan.marker, {"digest": plan.digest, "clips": clips})
    return [_scene_record(plan, clip, is_reused=False) for clip in clips]


def _shared_facts(plan: _Plan, split: int, rng: np.random.Generator) -> Facts:
    """Time and roadside of a recording: all pairs in turn, so that few recordings cover both."""
    turn = plan.number + int(np.random.default_rng([plan.seed, split]).integers(12))
    time, roadside = TIMES[turn % len(TIMES)], ROADSIDES[turn % len(ROADSIDES)]
    return replace(sample_facts(rng), time=time, roadside=roadside)


def _write_clip(plan: _Plan, clip: int, facts: Facts, seed: int, appearance: int) -> dict[str, Any]:
    rendered, events = make_scene(facts, seed, plan.size, appearance, plan.event_camera)
    entry = index_entry(plan.name, clip, plan.split)
    save_events(plan.root / entry["event_data"], events)
    write_mp4(plan.root / entry["mp4_data"], rendered.frames)
    images = event_images(events, NUM_EVENT_IMAGES) + event_images(events, 1)
    names = entry["event_image"] + entry["event_image_1f"]
    for relative, image in zip(names, images, strict=True):
        (plan.root / relative).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(plan.root / relative)
    files = [entry["event_data"], entry["mp4_data"], *names]
    sums = {relative: sha256_file(plan.root / relative) for relative in files}
    return {"entry": entry, "facts": facts.as_dict(), "num_events": len(events), "sha256": sums}


def _finished(plan: _Plan) -> list[SceneRecord] | None:
    """The recording as an earlier run left it; None if it is absent, different, or damaged."""
    if not plan.marker.is_file():
        return None
    marker = read_json(plan.marker)
    if marker["digest"] != plan.digest:
        return None
    for clip in marker["clips"]:
        for relative, digest in clip["sha256"].items():
            file = plan.root / relative
            if not file.is_file() or sha256_file(file) != digest:
                return None
    return [_scene_record(plan, clip, is_reused=True) for clip in marker["clips"]]


def _scene_record(plan: _Plan, clip: dict[str, Any], is_reused: bool) -> SceneRecord:
    facts, entry = Facts.from_dict(clip["facts"]), clip["entry"]
    return SceneRecord(entry["id"], plan.split, facts, entry, clip["num_events"], is_reused)


def _conversations(facts: Facts, answer: Answer | None) -> list[dict[str, str]]:
    if answer is None:
        return []
    return [
        {"from": role, "value": text}
        for index, question in enumerate(QUESTIONS)
        for role, text in (("human", question), ("gpt", answer(facts, index)))
    ]
