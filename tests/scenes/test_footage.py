"""Ordinary videos as scenes: their own frames, simulated events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xsd.errors import XsdError
from xsd.scenes.config import EventCameraConfig, ScenesConfig
from xsd.scenes.dataset import make_scenes, num_clips
from xsd.scenes.dsec import load_index
from xsd.scenes.events import load_events
from xsd.scenes.footage import linear_light, plan_footage, read_span
from xsd.scenes.video import read_frames, write_mp4

QUIET = EventCameraConfig(noise_rate_hz=0.0, num_hot_pixels=0)


def write_film(path: Path, seconds: float = 2.3, fps: int = 30, height: int = 72) -> Path:
    """A bright square that moves to the right at 40 pixels a second, on grey."""
    frames = np.full((int(seconds * fps), height, 128, 3), 60, np.uint8)
    for k, frame in enumerate(frames):
        left = int(8 + 40 * k / fps)
        frame[30:50, left : left + 16] = 220
    write_mp4(path, frames, fps)
    return path


def config(video: Path, out: Path, **changes: object) -> ScenesConfig:
    base = ScenesConfig(
        source="video", dataset_dir=video, output_dir=out, num_workers=1, event_camera=QUIET
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_a_film_becomes_scenes_of_the_layout(tmp_path: Path) -> None:
    film = write_film(tmp_path / "my drive.mp4")
    made = config(film, tmp_path / "out")
    assert num_clips(made) == 3
    records = list(make_scenes(made))
    scenes = load_index(tmp_path / "out")
    assert [scene.key for scene in scenes] == [f"my_drive/{k:06d}" for k in range(3)]
    assert {scene.split for scene in scenes} == {"test"}
    assert all(record.facts is None for record in records)
    for number, scene in enumerate(scenes):
        assert scene.events is not None and all(path.is_file() for path in scene.event_images)
        events = load_events(scene.events)
        assert (np.diff(events.t) >= 0).all() and events.t[0] >= 0 and events.t[-1] <= 1_000_000
        # The leading edge gets brighter, the trailing one darker; both move on with time.
        late = events.t > 500_000
        for polarity, offset in ((1, 16), (0, 0)):
            for half, seconds in ((~late, 0.25), (late, 0.75)):
                edge = events.x[half & (events.p == polarity)].mean()
                assert edge == pytest.approx(8 + offset + 40 * (0.5 * number + seconds), abs=3)
        assert set(np.unique(events.y)) <= set(range(28, 52))
        frames = read_frames(scene.video, 20)
        assert frames.shape == (20, 72, 128, 3)
        bright = np.flatnonzero(frames[0, 40, :, 0] > 150)
        assert bright[0] == pytest.approx(8 + 40 * 0.5 * number, abs=3)


def test_large_footage_is_made_smaller(tmp_path: Path) -> None:
    film = write_film(tmp_path / "a.mp4", seconds=1.2)
    (first, *_) = read_span(film, 0, 1, 36)
    assert first[1].shape == (36, 64, 3)
    spans = [at for at, _ in read_span(film, 0.5, 0.8, 72)]
    assert spans == pytest.approx(np.arange(15, 25) / 30, abs=1e-3)


def test_folders_name_the_splits(tmp_path: Path) -> None:
    for name in ("train/a.mp4", "val/b.mp4", "c.mp4"):
        write_film(tmp_path / "films" / name, seconds=1.1)
    made = config(tmp_path / "films", tmp_path / "out")
    list(make_scenes(made))
    found = {scene.recording: scene.split for scene in load_index(tmp_path / "out")}
    assert found == {"train_a": "train", "val_b": "val", "c": "test"}
    assert {job.split for job in plan_footage(replace(made, split="train"))} == {"train"}  # type: ignore[attr-defined]
    assert all(record.is_reused for record in make_scenes(made))


def test_light_is_linear() -> None:
    grey = np.array([[[0] * 3, [188] * 3, [255] * 3]], np.uint8)
    assert linear_light(grey)[0] == pytest.approx([0, 0.5, 1], abs=0.01)


def test_what_cannot_be_used_is_told(tmp_path: Path) -> None:
    short = write_film(tmp_path / "short.mp4", seconds=0.8)
    out = tmp_path / "out"
    for given, message in (
        (None, "needs dataset_dir"),
        (short, r"0\.80 s long; a clip takes 1 s"),
        (tmp_path / "none.mp4", "needs dataset_dir"),
    ):
        with pytest.raises(XsdError, match=message):
            plan_footage(replace(config(short, out), dataset_dir=given))
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 50)
    with pytest.raises(XsdError, match="cannot be opened as a video"):
        plan_footage(config(tmp_path / "noise.mp4", out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(XsdError, match="holds no videos"):
        plan_footage(config(tmp_path / "empty", out))
    for name in ("a b.mp4", "a_b.mp4"):
        write_film(tmp_path / "twice" / name)
    with pytest.raises(XsdError, match="two recordings would be 'a_b'; rename or remove one"):
        plan_footage(config(tmp_path / "twice", out))
    with pytest.raises(XsdError, match="1 second long"):
        plan_footage(config(short, out, window_s=2.0))
    with pytest.raises(XsdError, match="stride_s must be above 0"):
        plan_footage(config(short, out, stride_s=0.0))


def test_still_footage_gives_no_scenes(tmp_path: Path) -> None:
    write_mp4(tmp_path / "still.mp4", np.full((40, 64, 64, 3), 90, np.uint8), 30)
    with pytest.raises(XsdError, match="gave no clips"):
        list(make_scenes(config(tmp_path / "still.mp4", tmp_path / "out")))
