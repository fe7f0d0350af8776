"""A scene's files -> what both models look at: one way for extraction, benchmark and generation."""

from __future__ import annotations

from xsd.errors import XsdError
from xsd.pairs.base import Media
from xsd.scenes.events import event_images, load_events
from xsd.scenes.video import read_frames, read_image
from xsd.types import Scene


def read_media(scene: Scene, num_event_images: int, num_frames: int) -> Media:
    """Decode a scene into host memory.

    Event images are read where they were rendered beforehand, and rendered otherwise.

    Raises:
        XsdError: a file is missing or cannot be decoded.
    """
    rendered = scene.event_images
    if num_event_images == 1 and scene.event_image_1f is not None:
        rendered = (scene.event_image_1f,)
    if len(rendered) == num_event_images and all(path.is_file() for path in rendered):
        images = [read_image(path) for path in rendered]
    elif scene.events is not None:
        images = event_images(load_events(scene.events), num_event_images)
    else:
        raise XsdError(
            f"scene {scene.key}: neither {num_event_images} event images nor an event file"
        )
    return Media(images, read_frames(scene.video, num_frames))
