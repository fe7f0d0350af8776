"""Ordinary video as scenes: its own frames, and the events a camera there would have reported.

An event camera watches far faster than a video. Between two frames log intensity is taken to be
linear, so footage of 60 frames a second or more gives the more natural events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, UInt8

from xsd.errors import XsdError
from xsd.files import sha256_json
from xsd.scenes.camera import DURATION_US, FPS
from xsd.scenes.config import EventCameraConfig, ScenesConfig
from xsd.scenes.layout import NUM_EVENT_IMAGES
from xsd.scenes.produce import Clip, Job, refuse_namesakes, shares, write_clip
from xsd.scenes.simulate import simulate_events

_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
_LUMA = np.array((0.2126, 0.7152, 0.0722), np.float32)
_LINEAR = np.where(
    (_code := np.arange(256) / 255) <= 0.04045, _code / 12.92, ((_code + 0.055) / 1.055) ** 2.4
).astype(np.float32)
"""sRGB bytes to linear light."""


@dataclass(frozen=True)
class _Film(Job):
    """Some neighbouring windows of one video."""

    video: Path
    recording: str
    split: str
    first: int
    stride_s: float
    size: int
    seed: int
    event_camera: EventCameraConfig

    @property
    def name(self) -> str:
        return f"{self.recording}_{self.first:06d}"

    @property
    def digest(self) -> str:
        about = self.video.stat()
        return sha256_json(
            {**asdict(self), "root": None, "file": [about.st_size, about.st_mtime_ns]}
        )

    def make(self) -> list[Clip]:
        begins = [(self.first + k) * self.stride_s for k in range(self.num_clips)]
        shots = list(read_span(self.video, begins[0], begins[-1] + DURATION_US / 1e6, self.size))
        clips = []
        for number, begin in enumerate(begins, start=self.first):
            clip = self._clip(number, begin, shots)
            if clip is not None:
                clips.append(clip)
        return clips

    def _clip(self, number: int, begin: float, shots: list[Shot]) -> Clip | None:
        length = DURATION_US / 1e6
        seen = [shot for shot in shots if begin - 1e-3 <= shot[0] <= begin + length + 1e-3]
        if len(seen) < 2:
            return None
        times_us = np.array([(at - begin) * 1e6 for at, _ in seen])
        luma = np.stack([linear_light(frame) for _, frame in seen])
        rng = np.random.default_rng([self.seed, number])
        events = simulate_events(luma, np.clip(times_us, 0, DURATION_US), self.event_camera, rng)
        if len(events) < NUM_EVENT_IMAGES:
            return None
        # The data set's rate: of each twentieth of a second, the frame nearest to its beginning.
        wanted = np.arange(FPS) * (DURATION_US / FPS)
        nearest = np.abs(times_us[None] - wanted[:, None]).argmin(axis=1)
        frames = np.stack([seen[k][1] for k in nearest])
        return write_clip(self.root, self.recording, number, self.split, events, frames)


Shot = tuple[float, UInt8[np.ndarray, "H W 3"]]
"""Seconds since the video's start, and what was seen then."""


def plan_footage(config: ScenesConfig) -> list[Job]:
    """Every window of every video at ``dataset_dir``; a video is a recording.

    Raises:
        XsdError: no videos there, one that will not open or is shorter than a clip, or windows
            that are not one second long.
    """
    if config.window_s * 1e6 != DURATION_US:
        raise XsdError(f"window_s={config.window_s}: simulated clips are 1 second long")
    if not config.stride_s > 0 or config.size < 32:
        raise XsdError("stride_s must be above 0, and size at least 32")
    jobs: list[Job] = []
    for video, recording, split in _videos(config.dataset_dir, config.split):
        total = int((_seconds(video) - config.window_s) / config.stride_s + 1e-6) + 1
        jobs += [
            _Film(
                root=config.output_dir,
                num_clips=num_clips,
                video=video,
                recording=recording,
                split=split,
                first=first,
                stride_s=config.stride_s,
                size=config.size,
                seed=config.seed,
                event_camera=config.event_camera,
            )
            for first, num_clips in shares(total)
        ]
    return jobs


def read_span(path: Path, begin: float, end: float, size: int) -> Iterator[Shot]:
    """Frames of a stretch of a video, made smaller so that the shorter edge has ``size`` pixels.

    Raises:
        XsdError: it will not decode.
    """
    converter = VideoReformatter()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            base = stream.time_base or Fraction(1, av.time_base)
            start = stream.start_time or 0
            container.seek(start + int(begin / base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                at = float((frame.pts - start) * base)
                if at > end + 1e-3:
                    return
                if at >= begin - 1e-3:
                    width, height = _fitted(frame.width, frame.height, size)
                    small = converter.reformat(frame, width, height, format="rgb24")
                    yield at, small.to_ndarray()
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise XsdError(f"{path}: cannot be decoded ({error}); convert or remove it") from error


def _videos(given: Path | None, split: str) -> list[tuple[Path, str, str]]:
    """Path, recording name and split of each video."""
    if given is None or not given.exists():
        raise XsdError(
            f"source 'video' needs dataset_dir, a video or a folder of them; got {given or 'none'}"
        )
    if given.is_file():
        return [(given, _named(given.stem), "test" if split == "auto" else split)]
    found = sorted(p for p in given.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not found:
        raise XsdError(f"{given}: holds no videos ({', '.join(_SUFFIXES)}); check the path")
    videos = []
    for path in found:
        parts = path.relative_to(given).with_suffix("").parts
        of_folder = parts[0] if parts[0] in ("train", "val", "test") else "test"
        videos.append((path, _named("_".join(parts)), of_folder if split == "auto" else split))
    refuse_namesakes(given, [name for _, name, _ in videos])
    return videos


def _named(stem: str) -> str:
    """A folder name that every system takes."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem) or "video"


def _seconds(path: Path) -> float:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise XsdError(f"{path}: has no picture; give a video")
            stream = container.streams.video[0]
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = (container.duration or 0) / av.time_base
    except (av.error.FFmpegError, OSError) as error:
        raise XsdError(f"{path}: cannot be opened as a video ({error}); convert it") from error
    if seconds < DURATION_US / 1e6:
        raise XsdError(f"{path}: {seconds:.2f} s long; a clip takes 1 s")
    return seconds


def _fitted(width: int, height: int, size: int) -> tuple[int, int]:
    """Sizes with the shorter edge at most ``size``, both even."""
    scale = min(1.0, size / min(width, height))
    return tuple(max(2, round(edge * scale / 2) * 2) for edge in (width, height))  # type: ignore[return-value]


def linear_light(frame: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W"]:
    """Luminance of sRGB bytes."""
    luma: np.ndarray = _LINEAR[frame] @ _LUMA
    return luma
