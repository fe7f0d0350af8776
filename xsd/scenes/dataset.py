"""Every source of scenes behind one door: made, cut, simulated, or only indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from xsd.errors import XsdError
from xsd.files import make_folder, sha256_json, write_json
from xsd.scenes.config import EventCameraConfig, ScenesConfig
from xsd.scenes.facts import ROADSIDES, TIMES, Facts
from xsd.scenes.layout import FACTS_NAME, INDEX_NAME, SceneRecord
from xsd.scenes.produce import Clip, Job, produce, write_clip
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.synthetic import make_scene, sample_facts

RENDERER = 2
"""Raised whenever the same seed gives another picture: older recordings are then made anew."""
_SPLITS = ("train", "val", "test")

Answer = Callable[[Facts, int], str]
"""The reference answer to question k about a scene with these facts."""


@dataclass(frozen=True)
class _Synthetic(Job):
    """One synthetic recording."""

    split: str
    number: int
    size: int
    seed: int
    event_camera: EventCameraConfig

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:04d}"

    @property
    def digest(self) -> str:
        return sha256_json({**asdict(self), "root": None, "renderer": RENDERER})

    def make(self) -> list[Clip]:
        split = _SPLITS.index(self.split)
        rng = np.random.default_rng([self.seed, split, self.number])
        shared = _shared_facts(self, split, rng)
        appearance = int(rng.integers(1 << 16))
        clips = []
        for clip in range(self.num_clips):
            facts = sample_facts(rng, shared)
            seed = int(rng.integers(1 << 62))
            rendered, events = make_scene(facts, seed, self.size, appearance, self.event_camera)
            shown = facts.as_dict()
            clips.append(
                write_clip(self.root, self.name, clip, self.split, events, rendered.frames, shown)
            )
        return clips


def make_scenes(config: ScenesConfig, answer: Answer | None = None) -> Iterator[SceneRecord]:
    """Write scenes, or index a prepared folder, and yield every scene.

    Files depend on configuration and sources only, not on the number of workers; what an earlier
    run completed is kept. The index is written after the last record was taken: a folder without
    index is unfinished.

    Args:
        answer: fills the conversations of synthetic scenes; None leaves them empty.

    Raises:
        XsdError: the configuration cannot be met, or a source cannot be read.
    """
    if config.source == "prepared":
        from xsd.scenes.prepared import index_prepared

        yield from index_prepared(config.dataset_dir)
        return
    jobs = plan(config)
    root = make_folder(config.output_dir)
    records = []
    for record in produce(jobs, config.num_workers):
        records.append(record)
        yield record
    if not records:
        raise XsdError(f"source {config.source!r} gave no clips: no stretch has frames and events")
    facts = {record.key: record.facts for record in records if record.facts}
    if facts:
        write_json(root / FACTS_NAME, {key: value.as_dict() for key, value in facts.items()})
    entries = [{**r.entry, "conversations": _conversations(r.facts, answer)} for r in records]
    write_json(root / INDEX_NAME, entries)


def plan(config: ScenesConfig) -> Sequence[Job]:
    """What is to be made, in the order of the index; sources are looked at, not read.

    Raises:
        XsdError: the configuration cannot be met, or a source cannot be read.
    """
    if config.source == "dsec":
        from xsd.scenes.raw_dsec import plan_dsec

        return plan_dsec(config)
    if config.source == "video":
        from xsd.scenes.footage import plan_footage

        return plan_footage(config)
    return _plan_synthetic(config)


def num_clips(config: ScenesConfig) -> int | None:
    """How many clips there will be at most, for a progress bar; None: nobody knows yet."""
    if config.source == "prepared":
        return None
    return sum(job.num_clips for job in plan(config))


def _plan_synthetic(config: ScenesConfig) -> list[_Synthetic]:
    per = config.clips_per_recording
    if per < 1 or config.size < 32 or config.size % 2:
        raise XsdError("clips_per_recording must be at least 1, and size even and at least 32")
    if config.seed < 0 or config.event_camera.num_subframes < 2:
        raise XsdError("seed must not be negative, and num_subframes at least 2")
    counts = (config.num_train, config.num_val, config.num_test)
    if min(counts) < 0 or not sum(counts):
        raise XsdError("num_train, num_val and num_test must not be negative, nor all zero")
    return [
        _Synthetic(
            root=config.output_dir,
            num_clips=min(per, count - start),
            split=split,
            number=start // per,
            size=config.size,
            seed=config.seed,
            event_camera=config.event_camera,
        )
        for split, count in zip(_SPLITS, counts, strict=True)
        for start in range(0, count, per)
    ]


def _shared_facts(plan: _Synthetic, split: int, rng: np.random.Generator) -> Facts:
    """Time and roadside of a recording: all pairs in turn, so that few recordings cover both."""
    turn = plan.number + int(np.random.default_rng([plan.seed, split]).integers(12))
    time, roadside = TIMES[turn % len(TIMES)], ROADSIDES[turn % len(ROADSIDES)]
    return replace(sample_facts(rng), time=time, roadside=roadside)


def _conversations(facts: Facts | None, answer: Answer | None) -> list[dict[str, str]]:
    if answer is None or facts is None:
        return []
    return [
        {"from": role, "value": text}
        for index, question in enumerate(QUESTIONS)
        for role, text in (("human", question), ("gpt", answer(facts, index)))
    ]
