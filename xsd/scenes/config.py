"""What can be asked of the scenes stage; torch-free, so that ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xsd.errors import XsdError


@dataclass(frozen=True)
class EventCameraConfig:
    """A sensor that reports changes of log intensity (see ``scenes.simulate``)."""

    num_subframes: int = 50
    """Instants a second of scene is rendered at; in between, log intensity is linear in time."""
    contrast_threshold: float = 0.24
    """Change of log intensity that makes an event."""
    threshold_spread: float = 0.03
    """Standard deviation of the threshold over pixels."""
    refractory_us: int = 1000
    """After an event a pixel is blind for so long."""
    noise_rate_hz: float = 0.12
    """Background events a pixel and second."""
    num_hot_pixels: int = 3
    """Pixels that fire on their own, about 60 times a second."""

    def __post_init__(self) -> None:
        if not self.contrast_threshold > 0:
            raise XsdError(f"contrast_threshold={self.contrast_threshold}: must be above 0")
        for name in ("threshold_spread", "refractory_us", "noise_rate_hz", "num_hot_pixels"):
            if not getattr(self, name) >= 0:
                raise XsdError(f"{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class ScenesConfig:
    """Where scenes come from, how many, and what they look like."""

    source: Literal["synthetic", "prepared", "dsec", "video"] = "synthetic"
    """synthetic: make them; prepared: index a folder in the data set's layout; dsec: cut raw
    recordings; video: simulate the events of ordinary footage."""
    output_dir: Path = Path("outputs/scenes")
    """Where scenes are written."""
    dataset_dir: Path | None = None
    """The folder of source 'prepared'; of 'dsec', the one with the raw recordings; of 'video', a
    video file or a folder of them."""
    window_s: float = 1.0
    """Length of a clip cut from a recording or a video."""
    stride_s: float = 0.5
    """A clip begins so long after the one before."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Of cut clips. auto: DSEC's own; a video's by the folder that it lies in (train, val, test),
    else test."""
    num_train: int = 240
    """Clips of the train split; num_val and num_test likewise."""
    num_val: int = 40
    num_test: int = 60
    clips_per_recording: int = 10
    """Clips of a recording share time of day, roadside and camera; splits share no recording."""
    size: int = 96
    """Height and width of frames and sensor, in pixels; of a video, the shorter edge at most."""
    seed: int = 0
    num_workers: int = 2
    """Processes that render; the files do not depend on it."""
    event_camera: EventCameraConfig = field(default_factory=EventCameraConfig)
