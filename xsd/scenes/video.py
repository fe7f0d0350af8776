"""MP4 to frames and back; the only sampler of frames."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from xsd.errors import XsdError
from xsd.files import atomic_path
from xsd.scenes.camera import FPS

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def sample_indices(num_available: int, num_frames: int) -> list[int]:
    """Which frames are seen: integer linspace from the first to the last of the whole clip."""
    return [int(index) for index in np.linspace(0, num_available - 1, num_frames)]


def read_frames(path: Path, num_frames: int = 8) -> UInt8[np.ndarray, "N H W 3"]:
    """Sample a clip: an MP4 file, or a folder of images in the order of their names.

    Raises:
        XsdError: nothing there, it does not decode, or the images differ in size.
    """
    if path.is_dir():
        return _read_folder(path, num_frames)
    try:
        with path.open("rb") as handle:
            return _decode(io.BytesIO(handle.read()), num_frames)
    except OSError as error:
        raise XsdError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise XsdError(f"{path}: cannot be decoded ({error}); recreate or remove it") from error


def _decode(source: io.BytesIO, num_frames: int) -> UInt8[np.ndarray, "N H W 3"]:
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            container.streams.video[0].thread_type = "NONE"
            frames = list(container.decode(video=0))
    except av.error.FFmpegError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    if not frames:
        raise ValueError("it holds no frames")
    chosen = sample_indices(len(frames), num_frames)
    # One converter for all frames, and no threads: starting either costs more than a small frame.
    converter = VideoReformatter()
    decoded = {
        index: converter.reformat(frames[index], format="rgb24", threads=1).to_ndarray()
        for index in dict.fromkeys(chosen)
    }
    return np.stack([decoded[index] for index in chosen])


def _read_folder(path: Path, num_frames: int) -> UInt8[np.ndarray, "N H W 3"]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise XsdError(f"{path}: holds no images; check the path")
    chosen = [files[index] for index in sample_indices(len(files), num_frames)]
    images = [read_image(file) for file in chosen]
    if len({image.shape for image in images}) > 1:
        raise XsdError(f"{path}: its images differ in size; recreate the folder")
    return np.stack(images)


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """An image as RGB.

    Raises:
        XsdError: missing, or not an image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise XsdError(f"{path}: cannot be read as an image ({error}); check the file") from error


def encode(frames: UInt8[np.ndarray, "N H W 3"], fps: int = FPS) -> bytes:
    """An MP4 in memory: H.264, yuv420p, the same bytes on every run."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        # Macroblock-tree rate control gave a tenth of the encodes other bytes (AVX-512).
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "no-mbtree=1"}
        converter = VideoReformatter()
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(converter.reformat(picture, format="yuv420p", threads=1)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_mp4(path: Path, frames: UInt8[np.ndarray, "N H W 3"], fps: int = FPS) -> None:
    """Write a clip (atomic). Height and width must be even."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode(frames, fps))


def round_trip(
    frames: UInt8[np.ndarray, "T H W 3"], num_frames: int = 8
) -> UInt8[np.ndarray, "N H W 3"]:
    """What ``read_frames`` would give after ``write_mp4``, without a file."""
    return _decode(io.BytesIO(encode(frames)), num_frames)
