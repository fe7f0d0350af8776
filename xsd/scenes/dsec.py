"""The data set's index: which scenes there are, in which split, and what is asked about them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xsd.errors import XsdError
from xsd.files import inside, read_json, sha256_file
from xsd.scenes.layout import FACTS_NAME, INDEX_NAME
from xsd.scenes.questions import QUESTIONS
from xsd.types import Sample, Scene, Split

VAL_SHARE = 0.1
_EDGE_BYTES = 1 << 16


def load_index(dataset_dir: Path, max_samples: int = -1, split: Split | None = None) -> list[Scene]:
    """Scenes of a data set, in the order of its index.

    Where the index has no validation split, about a tenth of the training recordings become one, by
    a hash of their names (at least one recording, if there are two or more).

    Args:
        max_samples: of the split, keep the first so many scenes; -1 keeps all.
        split: keep this split only; None keeps all.

    Raises:
        XsdError: no index, a malformed entry, a path outside the folder, or an empty split.
    """
    index = dataset_dir / INDEX_NAME
    if not index.is_file():
        raise XsdError(f"{dataset_dir}: no {INDEX_NAME}; run 'xsd scenes' or check dataset_dir")
    entries = read_json(index)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise XsdError(f"{index}: not a list of scenes; recreate it")
    facts = _facts(dataset_dir)
    scenes = _with_validation([_scene(dataset_dir, entry, facts) for entry in entries])
    chosen = [scene for scene in scenes if split is None or scene.split == split]
    if not chosen:
        there = ", ".join(f"{n} {name}" for name, n in Counter(s.split for s in scenes).items())
        raise XsdError(
            f"{index}: no scenes in split {split or 'any'!r}; it has {there or 'none at all'}; "
            "choose another --split, or set 'split' of its entries"
        )
    return chosen if max_samples < 0 else chosen[:max_samples]


def samples(scenes: Sequence[Scene], max_questions: int = len(QUESTIONS)) -> Iterator[Sample]:
    """Every scene with each of the first ``max_questions`` questions."""
    for scene in scenes:
        for index, question in enumerate(QUESTIONS[:max_questions]):
            yield Sample(scene, index, question)


def dataset_digest(dataset_dir: Path) -> str:
    """Hex sha256 that changes with the index, or with size, head or tail of any file it names."""
    scenes = load_index(dataset_dir)
    digest = hashlib.sha256(sha256_file(dataset_dir / INDEX_NAME).encode())
    for scene in scenes:
        for path in _files(scene):
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            digest.update(_edges(path))
    return digest.hexdigest()


def _files(scene: Scene) -> Iterator[Path]:
    """The scene's files that are there."""
    listed = (scene.events, *scene.event_images, scene.event_image_1f, scene.video)
    for path in listed:
        if path is not None and path.is_dir():
            yield from sorted(path.iterdir())
        elif path is not None and path.is_file():
            yield path


def _edges(path: Path) -> bytes:
    with path.open("rb") as handle:
        head = handle.read(_EDGE_BYTES)
        handle.seek(max(_EDGE_BYTES, path.stat().st_size - _EDGE_BYTES))
        return head + handle.read()


def _facts(dataset_dir: Path) -> Mapping[str, Any]:
    path = dataset_dir / FACTS_NAME
    facts = read_json(path) if path.is_file() else {}
    if not isinstance(facts, dict):
        raise XsdError(f"{path}: not a map of scenes; recreate or remove it")
    return facts


def _scene(root: Path, entry: Mapping[str, Any], facts: Mapping[str, Any]) -> Scene:
    """Raises XsdError on anything an index of the data set does not hold."""
    where = f"{root / INDEX_NAME}: entry {entry.get('id')!r}"

    def paths(key: str) -> tuple[Path, ...]:
        value = entry.get(key) or []
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(
            isinstance(item, str) and item.isprintable() for item in listed
        ):
            raise XsdError(f"{where}: {key} is not a path or a list of paths; recreate the index")
        return tuple(inside(root, item) for item in listed)

    split = entry.get("split")
    if split not in ("train", "val", "test"):
        raise XsdError(f"{where}: split {split!r} is not train, val or test; recreate the index")
    events, mp4, folder = paths("event_data"), paths("mp4_data"), paths("video_data")
    videos = mp4 + folder
    if not videos:
        raise XsdError(f"{where}: neither mp4_data nor video_data; recreate the index")
    video = next((path for path in videos if path.exists()), videos[0])
    named = (events or videos)[0]
    recording, clip = named.parent.name, re.fullmatch(r"\d+", named.stem)
    if clip is None or not recording:
        raise XsdError(f"{where}: {named.name} is not named by its clip number; recreate the index")
    scene = Scene(
        recording=recording,
        clip=int(clip[0]),
        split=split,
        events=events[0] if events else None,
        event_images=paths("event_image"),
        event_image_1f=next(iter(paths("event_image_1f")), None),
        video=video,
    )
    return replace(scene, facts=facts.get(scene.key))


def _with_validation(scenes: list[Scene]) -> list[Scene]:
    if any(scene.split == "val" for scene in scenes):
        return scenes
    recordings = {scene.recording for scene in scenes if scene.split == "train"}
    # By hash, not by chance or by order: every stage finds the same recordings.
    ranked = sorted(recordings, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held_out = set(ranked[: max(1, round(VAL_SHARE * len(ranked)))]) if len(ranked) > 1 else set()
    return [
        replace(scene, split="val")
        if scene.split == "train" and scene.recording in held_out
        else scene
        for scene in scenes
    ]
