"""A scene's files -> what both models look at: one way for extraction, benchmark and generation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from xsd.errors import XsdError
from xsd.hidden.plan import Batch
from xsd.pairs.base import Media, ModelPair
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


@dataclass(frozen=True, slots=True)
class ClipPixels:
    """What both models' towers take of a clip."""

    drafter: Float[Tensor, "_N 3 _H _W"]
    verifier: Float[Tensor, "_N 3 _H _W"]


@dataclass(frozen=True)
class Clips:
    """The media of a batch, ready for the models."""

    pixels: Mapping[str, ClipPixels]
    """By scene key."""
    failures: dict[str, str]
    """The reason, by sample key, of those that cannot be read."""
    seconds: float


def read_clips(pair: ModelPair, batch: Batch) -> Clips:
    """Decode a batch's files and run both image processors: all work that needs no model."""
    start = time.monotonic()
    pixels: dict[str, ClipPixels] = {}
    failures: dict[str, str] = {}
    for scene in batch.scenes:
        try:
            media = read_media(scene, pair.num_event_images, pair.num_frames)
            pixels[scene.key] = ClipPixels(pair.drafter.pixels(media), pair.verifier.pixels(media))
        except XsdError as error:
            failures |= {s.key: str(error) for s in batch.samples if s.scene.key == scene.key}
    return Clips(pixels, failures, time.monotonic() - start)
