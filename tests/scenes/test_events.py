"""Event files of all origins, hostile ones included, and their pictures."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xsd.errors import XsdError
from xsd.scenes.events import Events, event_images, load_events, save_events

GOLDEN = Path(__file__).parents[1] / "data" / "eventgpt_golden"
REAL = Path(__file__).parents[2] / ".." / "shared" / "real" / "events_640x480_50ms.npy"


def make_events(x: list[int], y: list[int], p: list[int]) -> Events:
    return Events(
        np.array(x, np.uint16),
        np.array(y, np.uint16),
        np.arange(len(x), dtype=np.int64),
        np.array(p, np.uint8),
    )


def content(**changes: object) -> dict[str, object]:
    events = {
        "x": np.array([1, 2, 3], np.uint16),
        "y": np.array([0, 1, 2], np.uint16),
        "t": np.array([5, 6, 7], np.uint32),
        "p": np.array([0, 1, 1], np.uint8),
    }
    return {**events, **changes}


def write_object(path: Path, value: object) -> Path:
    whole = np.empty((), dtype=object)
    whole[()] = value
    np.save(path, whole, allow_pickle=True)
    return path


def write_pickle(path: Path, stream: bytes) -> Path:
    """An ``.npy`` of one object whose pickle is the given stream."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    path.write_bytes(header.getvalue() + stream)
    return path


def test_golden_images_are_reproduced_bit_by_bit() -> None:
    images = event_images(load_events(GOLDEN / "events.npy"), 5)
    for index, image in enumerate(images):
        expected = np.asarray(Image.open(GOLDEN / f"event_{index}.png").convert("RGB"))
        assert np.array_equal(image, expected)


@pytest.mark.skipif(not REAL.is_file(), reason="the real recording is not beside the checkout")
def test_real_recording_loads() -> None:
    events = load_events(REAL)
    assert len(events) == 132_268
    assert (int(events.x.max()), int(events.y.max())) == (639, 479)
    assert event_images(events, 1)[0].shape == (480, 640, 3)


def test_round_trip(tmp_path: Path) -> None:
    events = make_events([3, 1, 2], [0, 5, 4], [1, 0, 1])
    save_events(tmp_path / "clip.npy", events)
    loaded = load_events(tmp_path / "clip.npy")
    for name in "xytp":
        assert np.array_equal(getattr(loaded, name), getattr(events, name))
    original = np.load(tmp_path / "clip.npy", allow_pickle=True).item()
    assert {key: value.dtype.name for key, value in original.items()} == {
        "x": "uint16",
        "y": "uint16",
        "t": "uint32",
        "p": "uint8",
    }


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_both_generations_of_numpy(tmp_path: Path, protocol: int, module: bytes) -> None:
    stream = pickle.dumps(np.array(content(), dtype=object), protocol)
    written = b"numpy._core.multiarray"
    assert written in stream
    new = module + b".multiarray"
    if protocol == 3:
        stream = stream.replace(written, new)
    else:
        old_name, new_name = (bytes([0x8C, len(name)]) + name for name in (written, new))
        # Frames carry their length; without the frame opcode the stream is as valid.
        stream = stream[:2] + stream[11:].replace(old_name, new_name)
    assert len(load_events(write_pickle(tmp_path / "clip.npy", stream))) == 3


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["whole", "value", "extra"])
def test_hostile_pickle_is_refused_unexecuted(tmp_path: Path, place: str) -> None:
    bomb = _Hostile(tmp_path / "executed")
    value = {"whole": bomb, "value": content(x=bomb), "extra": content(z=bomb)}[place]
    path = write_object(tmp_path / "clip.npy", value)
    with pytest.raises(XsdError, match="mkdir") as caught:
        load_events(path)
    assert not (tmp_path / "executed").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x04r\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x04\x82\x01.",
    ],
    ids=["memo of gigabytes", "bytearray", "bytes beyond the end", "extension registry"],
)
def test_stream_that_costs_memory_is_refused(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(XsdError, match="not an event file"):
        load_events(write_pickle(tmp_path / "clip.npy", stream))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1, 2], "does not hold a dict"),
        ({"x": np.zeros(2, int)}, "no y, t, p"),
        (content(x=np.zeros(2, np.uint16)), "differ in length"),
        ({key: np.zeros(0, np.uint16) for key in "xytp"}, "no events"),
        (content(x=np.zeros((3, 1), np.uint16)), "one-dimensional"),
        (content(x=np.zeros(3)), "array of integers"),
        (content(x=[1, 2, 3]), "array of integers"),
        (content(x=np.array([0, 1, -1])), "leaves the range"),
        (content(y=np.array([0, 1, 1 << 20])), "leaves the range"),
        (content(p=np.array([0, 1, 2], np.uint8)), "other than 0 and 1"),
    ],
)
def test_wrong_content_is_one_line(tmp_path: Path, value: object, what: str) -> None:
    path = write_object(tmp_path / "clip.npy", value)
    with pytest.raises(XsdError, match=what) as caught:
        load_events(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_array_and_missing_file(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(XsdError, match="not a dict"):
        load_events(tmp_path / "plain.npy")
    with pytest.raises(XsdError, match="check the path"):
        load_events(tmp_path / "absent.npy")


@settings(max_examples=40)
@given(cut=st.floats(0, 0.999))
def test_truncated_file(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = write_object(tmp_path_factory.mktemp("cut") / "clip.npy", content())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(XsdError, match="not an event file"):
        load_events(path)


@settings(max_examples=60)
@given(place=st.integers(0, 100_000), value=st.integers(0, 255))
def test_altered_byte_never_escapes(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = write_object(tmp_path_factory.mktemp("bit") / "clip.npy", content())
    altered = bytearray(path.read_bytes())
    altered[place % len(altered)] = value
    path.write_bytes(bytes(altered))
    try:
        load_events(path)
    except XsdError as error:
        assert "\n" not in str(error)


def reference_images(events: Events, num_images: int) -> list[np.ndarray]:
    """The definition, event by event."""
    images, share = [], len(events) // num_images
    for k in range(num_images):
        part = slice(k * share, len(events) if k == num_images - 1 else (k + 1) * share)
        x, y, p = (getattr(events, name)[part].astype(int) for name in "xyp")
        image = np.full((y.max() + 1, x.max() + 1, 3), 255, np.uint8)
        for column, row, polarity in zip(x, y, p, strict=True):
            image[row, column] = (0, 0, 255) if polarity == 0 else (255, 0, 0)
        images.append(image)
    return images


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 1)), min_size=5),
    st.integers(1, 5),
)
def test_images_are_drawn_as_defined(rows: list[tuple[int, int, int]], num_images: int) -> None:
    events = make_events(*(list(column) for column in zip(*rows, strict=True)))
    drawn = event_images(events, num_images)
    for image, expected in zip(drawn, reference_images(events, num_images), strict=True):
        assert np.array_equal(image, expected)


def test_too_few_events_for_the_images() -> None:
    with pytest.raises(XsdError, match="cannot fill"):
        event_images(make_events([1], [1], [1]), 5)
