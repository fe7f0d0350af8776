"""Frames from MP4 files and folders, and files that are neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from xsd.errors import XsdError
from xsd.scenes.video import (
    encode,
    read_frames,
    read_image,
    round_trip,
    sample_indices,
    write_mp4,
)


@pytest.fixture
def clip() -> np.ndarray:
    """Twenty frames whose grey says which they are."""
    shades = np.arange(20, dtype=np.uint8) * 12
    return np.broadcast_to(shades[:, None, None, None], (20, 48, 64, 3)).copy()


@given(st.integers(1, 500), st.integers(1, 32))
def test_sampling_spans_the_whole_clip(num_available: int, num_frames: int) -> None:
    indices = sample_indices(num_available, num_frames)
    assert len(indices) == num_frames
    assert indices == sorted(indices)
    assert indices[0] == 0
    if num_frames > 1:
        assert indices[-1] == num_available - 1


def test_mp4_round_trip(tmp_path: Path, clip: np.ndarray) -> None:
    write_mp4(tmp_path / "clip.mp4", clip)
    frames = read_frames(tmp_path / "clip.mp4")
    assert frames.shape == (8, 48, 64, 3)
    expected = clip[sample_indices(20, 8)].astype(int)
    assert np.abs(frames.astype(int) - expected).max() <= 4
    assert np.array_equal(frames, round_trip(clip))


def test_encoding_is_deterministic(clip: np.ndarray) -> None:
    assert encode(clip) == encode(clip)


def test_folder_of_images(tmp_path: Path, clip: np.ndarray) -> None:
    for index, frame in enumerate(clip):
        Image.fromarray(frame).save(tmp_path / f"{index:06d}.png")
    assert np.array_equal(read_frames(tmp_path, 5), clip[sample_indices(20, 5)])


def test_bad_videos(tmp_path: Path, clip: np.ndarray) -> None:
    noise, cut, empty = (tmp_path / name for name in ("noise.mp4", "cut.mp4", "empty.mp4"))
    noise.write_bytes(np.random.default_rng(0).bytes(2000))
    cut.write_bytes(encode(clip)[:-400])
    empty.touch()
    for path in (noise, cut, empty):
        with pytest.raises(XsdError, match="cannot be decoded") as caught:
            read_frames(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(XsdError, match="check the path"):
        read_frames(tmp_path / "absent.mp4")


def test_bad_folders(tmp_path: Path, clip: np.ndarray) -> None:
    with pytest.raises(XsdError, match="holds no images"):
        read_frames(tmp_path)
    Image.fromarray(clip[0]).save(tmp_path / "0.png")
    Image.fromarray(clip[0, :20]).save(tmp_path / "1.png")
    with pytest.raises(XsdError, match="differ in size"):
        read_frames(tmp_path)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    with pytest.raises(XsdError, match="cannot be read as an image"):
        read_frames(tmp_path)
    with pytest.raises(XsdError, match="cannot be read as an image"):
        read_image(tmp_path / "2.png")
