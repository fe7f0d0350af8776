"""Raw DSEC recordings cut into clips: events of the left camera beside its rectified frames.

A recording is a folder with ``events/left/events.h5`` and, there or under another top folder of
the same archive set, ``images/left/rectified/*.png`` and ``images/timestamps.txt``. Event times
plus ``t_offset`` and image times are microseconds of one clock.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from xsd.errors import XsdError
from xsd.files import sha256_json
from xsd.scenes.config import ScenesConfig
from xsd.scenes.events import Events
from xsd.scenes.layout import NUM_EVENT_IMAGES
from xsd.scenes.produce import Clip, Job, refuse_namesakes, shares, write_clip
from xsd.scenes.video import read_image

TEST_RECORDINGS = frozenset(
    f"{place}_{letter}"
    for place, letters in {
        "interlaken_00": "ab",
        "interlaken_01": "a",
        "thun_01": "ab",
        "zurich_city_12": "a",
        "zurich_city_13": "ab",
        "zurich_city_14": "abc",
        "zurich_city_15": "a",
    }.items()
    for letter in letters
)
"""DSEC's own test split."""
_TIMES = ("../../timestamps.txt", "../timestamps.txt", "../exposure_timestamps.txt")
"""Where the images' times may lie, seen from the images: one time a line, or 'start, end'."""


@dataclass(frozen=True)
class Recording:
    """Files of one raw recording."""

    name: str
    split: str
    events: Path
    images: Path
    times: Path


@dataclass(frozen=True)
class _Cut(Job):
    """Some neighbouring windows of one recording."""

    recording: Recording
    first: int
    """Number of the first window."""
    window_us: int
    stride_us: int

    @property
    def name(self) -> str:
        return f"{self.recording.name}_{self.first:06d}"

    @property
    def digest(self) -> str:
        sources = {
            str(path): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in (self.recording.events, self.recording.images, self.recording.times)
        }
        return sha256_json({**asdict(self), "root": None, "sources": sources})

    def make(self) -> list[Clip]:
        where = self.recording
        times, files = image_times(where)
        clips = []
        with EventFile(where.events) as events:
            start, _ = bounds(times, events)
            for number in range(self.first, self.first + self.num_clips):
                begin = start + number * self.stride_us
                inside = np.flatnonzero((times >= begin) & (times < begin + self.window_us))
                found = events.between(begin, begin + self.window_us)
                if found is None or len(found) < NUM_EVENT_IMAGES or not len(inside):
                    continue
                frames = np.stack([_even(read_image(files[k])) for k in inside])
                clips.append(write_clip(self.root, where.name, number, where.split, found, frames))
        return clips


class EventFile:
    """``events.h5``, opened: events between two instants without reading the others.

    ``ms_to_idx[k]`` is the first event at or after millisecond k of the recording.

    Raises:
        XsdError: unreadable, or not DSEC's layout.
    """

    def __init__(self, path: Path) -> None:
        # Registers the blosc filter that the files are packed with.
        import h5py
        import hdf5plugin  # noqa: F401

        self.path = path
        try:
            self._file = h5py.File(path, "r")
            self._columns = {key: self._file[f"events/{key}"] for key in "xytp"}
            self._ms_to_idx: Any = self._file["ms_to_idx"]
            self.offset_us = int(self._file["t_offset"][()])
            last = int(self._columns["t"][-1])
        except (OSError, KeyError, ValueError, IndexError) as error:
            line = " ".join(str(error).split())
            raise XsdError(
                f"{path}: not DSEC's events.h5 ({line}); download it again or remove the recording"
            ) from error
        self.first_us = self.offset_us + int(self._columns["t"][0])
        self.last_us = self.offset_us + last

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def between(self, begin_us: int, end_us: int) -> Events | None:
        """Events in [begin, end) of the images' clock, their times relative to ``begin``.

        Raises:
            XsdError: the file is damaged.
        """
        begin, end = begin_us - self.offset_us, end_us - self.offset_us
        try:
            rows = slice(self._row(begin // 1000), self._row(-(-end // 1000)))
            t = np.asarray(self._columns["t"][rows]).astype(np.int64)
            low, high = np.searchsorted(t, (begin, end))
            if low == high:
                return None
            rows = slice(rows.start + int(low), rows.start + int(high))
            x, y, p = (np.asarray(self._columns[key][rows]) for key in "xyp")
        except (OSError, ValueError) as error:
            line = " ".join(str(error).split())
            raise XsdError(f"{self.path}: cannot be read ({line}); download it again") from error
        return Events(
            x.astype(np.uint16), y.astype(np.uint16), t[low:high] - begin, p.astype(np.uint8)
        )

    def _row(self, millisecond: int) -> int:
        """First event at or after a millisecond; beyond the table: all events there are."""
        if millisecond < 0:
            return 0
        if millisecond >= len(self._ms_to_idx):
            return len(self._columns["t"])
        return int(self._ms_to_idx[millisecond])


def plan_dsec(config: ScenesConfig) -> list[Job]:
    """Every window of every recording under ``dataset_dir``.

    Raises:
        XsdError: no recordings there, one without images or times, or a window that is none.
    """
    window_us, stride_us = round(config.window_s * 1e6), round(config.stride_s * 1e6)
    if window_us < 1 or stride_us < 1:
        raise XsdError("window_s and stride_s must be above 0")
    jobs: list[Job] = []
    for recording in find_recordings(config.dataset_dir, config.split):
        times, _ = image_times(recording)
        with EventFile(recording.events) as events:
            start, end = bounds(times, events)
        total = max(0, (end - start - window_us) // stride_us + 1)
        jobs += [
            _Cut(
                root=config.output_dir,
                num_clips=num_clips,
                recording=recording,
                first=first,
                window_us=window_us,
                stride_us=stride_us,
            )
            for first, num_clips in shares(total)
        ]
    return jobs


def find_recordings(root: Path | None, split: str) -> list[Recording]:
    """Recordings under a folder, by name; right-hand cameras are left alone.

    Raises:
        XsdError: no folder, nothing in it, or a recording without images or times.
    """
    if root is None or not root.is_dir():
        raise XsdError(
            f"source 'dsec' needs dataset_dir, the folder of raw recordings; got {root or 'none'}"
        )
    found = sorted(path for path in root.rglob("events.h5") if path.parent.name != "right")
    if not found:
        raise XsdError(f"{root}: holds no events.h5; unpack DSEC's events there or check the path")
    recordings = [_recording(root, path, split) for path in found]
    refuse_namesakes(root, [recording.name for recording in recordings])
    return recordings


def _recording(root: Path, events: Path, split: str) -> Recording:
    nested = events.parent.name == "left" and events.parent.parent.name == "events"
    folder = events.parents[2] if nested else events.parent
    name = folder.name
    # DSEC's archives unpack into train_events, train_images, train_images_timestamps and so on.
    places = [folder, *(path for path in sorted(root.glob(f"*/{name}")) if path != folder)]
    images = [p / "images/left/rectified" for p in places]
    image = next((path for path in images if path.is_dir()), None)
    if image is None:
        raise XsdError(f"{folder}: no images/left/rectified; unpack the recording's images too")
    stated = [p / "images/timestamps.txt" for p in places] + [image / part for part in _TIMES]
    times = next((path.resolve() for path in stated if path.is_file()), None)
    if times is None:
        raise XsdError(f"{image}: no timestamps.txt for its images; unpack DSEC's timestamps too")
    if split == "auto":
        parts = {part.split("_")[0] for part in folder.relative_to(root).parts[:-1]}
        is_test = name in TEST_RECORDINGS or ("test" in parts and "train" not in parts)
        split = "test" if is_test else "train"
    return Recording(name, split, events, image, times)


def image_times(recording: Recording) -> tuple[Int64[np.ndarray, " n"], list[Path]]:
    """When each image was taken (microseconds; the middle of an exposure), and the images.

    Raises:
        XsdError: not numbers, or not one line an image.
    """
    files = sorted(recording.images.glob("*.png"))
    try:
        table = np.loadtxt(recording.times, dtype=np.int64, delimiter=None, comments="#", ndmin=2)
    except ValueError:
        try:
            table = np.loadtxt(recording.times, dtype=np.int64, delimiter=",", ndmin=2)
        except ValueError as error:
            raise XsdError(f"{recording.times}: not a table of times ({error})") from error
    if len(table) != len(files) or not len(files):
        raise XsdError(
            f"{recording.times}: {len(table)} times for {len(files)} images in "
            f"{recording.images}; unpack both again"
        )
    return table[:, :2].mean(axis=1).astype(np.int64), files


def bounds(times: Int64[np.ndarray, " n"], events: EventFile) -> tuple[int, int]:
    """The stretch that both cameras cover."""
    return max(int(times[0]), events.first_us), min(int(times[-1]), events.last_us) + 1


def _even(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """H.264 in yuv420p wants even sides."""
    return image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
