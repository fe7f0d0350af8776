"""Names in the data set's folder, and the row of its index that describes a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xsd.scenes.facts import Facts

INDEX_NAME = "EventGPT_Instruction_Subset.json"
FACTS_NAME = "facts.json"
"""Ours, beside the index: what is true of a synthetic scene, by scene key."""
LINK_NAME = "dataset.json"
"""Ours, what a run keeps of a prepared data set: where it lies, and its digest."""
NUM_EVENT_IMAGES = 5


@dataclass(frozen=True)
class SceneRecord:
    """One scene on disk."""

    key: str
    split: str
    facts: Facts | None
    """None for a scene that we did not make."""
    entry: dict[str, Any]
    """Its row of the index, without conversations; paths are relative to the data set."""
    num_events: int | None
    """None for a scene that was found, and not looked into."""
    is_reused: bool
    """It was there already, complete and (if ours) unaltered."""


def index_entry(recording: str, clip: int, split: str) -> dict[str, Any]:
    """The row of a clip that has events, event images and an MP4, at their usual places."""
    place = f"{recording}/{clip:06d}"
    return {
        "id": place,
        "split": split,
        "event_data": f"event_npy/{place}.npy",
        "video_data": None,
        "mp4_data": f"mp4/{place}.mp4",
        "event_image": [f"event_image/{place}_{k}.png" for k in range(NUM_EVENT_IMAGES)],
        "event_image_1f": [f"event_image_1f/{place}_0.png"],
        "conversations": [],
    }
