"""What can be asked of the scenes stage; torch-free, so that ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


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


@dataclass(frozen=True)
class ScenesConfig:
    """Where scenes come from, how many, and what they look like."""

    source: Literal["synthetic", "prepared", "dsec", "video"] = "synthetic"
    """synthetic: make them; prepared: index a folder in the data set's layout."""
    output_dir: Path = Path("outputs/scenes")
    """Where synthetic scenes are written."""
    dataset_dir: Path | None = None
    """The folder of source 'prepared'."""
    num_train: int = 240
    """Clips of the train split; num_val and num_test likewise."""
    num_val: int = 40
    num_test: int = 60
    clips_per_recording: int = 10
    """Clips of a recording share time of day, roadside and camera; splits share no recording."""
    size: int = 96
    """Height and width of frames and sensor, in pixels."""
    seed: int = 0
    num_workers: int = 2
    """Processes that render; the files do not depend on it."""
    event_camera: EventCameraConfig = field(default_factory=EventCameraConfig)
