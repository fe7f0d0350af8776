"""A folder that somebody prepared in the data set's layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xsd.errors import XsdError
from xsd.files import read_json, write_json
from xsd.scenes.dsec import load_index
from xsd.scenes.facts import Facts
from xsd.scenes.layout import INDEX_NAME, SceneRecord


def index_prepared(folder: Path | None) -> Iterator[SceneRecord]:
    """Check a folder's index, or write one from the files found (all in split train).

    Raises:
        XsdError: no such folder, no event files, events without video, or an unfit index.
    """
    if folder is None or not folder.is_dir():
        raise XsdError(
            f"source 'prepared' needs dataset_dir, an existing folder; got {folder or 'none'}"
        )
    index = folder / INDEX_NAME
    if not index.is_file():
        events = sorted(folder.glob("event_npy/*/*.npy"))
        if not events:
            raise XsdError(f"{folder}: neither {INDEX_NAME} nor event_npy/*/*.npy; check the path")
        write_json(index, [_found(folder, path) for path in events])
    for entry, scene in zip(read_json(index), load_index(folder), strict=True):
        facts = Facts.from_dict(scene.facts) if scene.facts else None
        yield SceneRecord(scene.key, scene.split, facts, entry, None, is_reused=True)


def _found(folder: Path, events: Path) -> dict[str, Any]:
    """An index row from the files that belong to an event file."""
    recording, clip = events.parent.name, events.stem
    video, mp4 = f"video/{recording}/{clip}", f"mp4/{recording}/{clip}.mp4"
    has_video, has_mp4 = (folder / video).is_dir(), (folder / mp4).is_file()
    if not has_video and not has_mp4:
        raise XsdError(f"{folder}: {events.name} of {recording} has no {mp4}; add or remove it")

    def images(kind: str) -> list[str]:
        found = sorted((folder / kind / recording).glob(f"{clip}_*.png"))
        return [path.relative_to(folder).as_posix() for path in found]

    return {
        "id": f"{recording}/{clip}",
        "split": "train",
        "event_data": events.relative_to(folder).as_posix(),
        "video_data": video if has_video else None,
        "mp4_data": mp4 if has_mp4 else None,
        "event_image": images("event_image"),
        "event_image_1f": images("event_image_1f"),
        "conversations": [],
    }
