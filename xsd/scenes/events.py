"""Event files and event images, as EventGPT reads and draws them."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Shaped, UInt8, UInt16

from xsd.errors import XsdError
from xsd.files import atomic_path

BLUE, RED, WHITE = (0, 0, 255), (255, 0, 0), 255
_MAX_COORDINATE = 1 << 14


@dataclass(frozen=True)
class Events:
    """What an event camera reported, in order of time."""

    x: UInt16[np.ndarray, " n"]
    y: UInt16[np.ndarray, " n"]
    t: Int[np.ndarray, " n"] | Shaped[np.ndarray, " n"]
    """Microseconds."""
    p: UInt8[np.ndarray, " n"]
    """Polarity: 1 brighter, 0 darker."""

    def __len__(self) -> int:
        return len(self.x)


class _NumpyOnly(pickle.Unpickler):
    """Rebuilds plain arrays and dicts; anything else in the stream is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return np._core.numeric._frombuffer  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no event file needs")


def load_events(path: Path) -> Events:
    """Read the ``.npy`` of an event clip: a dict of x, y, t, p in an object array, which is a pickle.

    The pickle is read by an unpickler that can only build numpy arrays.

    Raises:
        XsdError: not such a file, or its arrays are not one-dimensional integers of one length.
    """
    try:
        with path.open("rb") as handle:
            content = _unpickle(handle)
    except OSError as error:
        raise XsdError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise XsdError(f"{path}: not an event file ({reason}); recreate or remove it") from error
    try:
        return _checked(content)
    except ValueError as error:
        raise XsdError(f"{path}: {error}; recreate or remove it") from error


_BROKEN = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    ImportError,
    MemoryError,
    OverflowError,
    struct.error,
)
"""What a damaged or hostile stream makes the unpickler raise."""


def _unpickle(handle: BinaryIO) -> Any:
    version = np.lib.format.read_magic(handle)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(handle)
    else:
        raise ValueError(f"npy format {version[0]}.{version[1]}")
    if shape != () or dtype != np.dtype(object):
        raise ValueError(f"holds an array of {dtype} and shape {shape}, not a dict in a 0-d object array")
    array = _NumpyOnly(io.BytesIO(handle.read())).load()
    if not isinstance(array, np.ndarray) or array.shape != () or array.dtype != np.dtype(object):
        raise ValueError("the pickle does not hold a 0-d object array")
    return array.item()


def _checked(content: Any) -> Events:
    if not isinstance(content, Mapping):
        raise ValueError("the array does not hold a dict with x, y, t, p")
    missing = [key for key in "xytp" if key not in content]
    if missing:
        raise ValueError(f"no {', '.join(missing)} among the keys {sorted(map(str, content))}")
    arrays = {key: content[key] for key in "xytp"}
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "uib":
            raise ValueError(f"{key} is not a one-dimensional array of integers")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"x, y, t, p differ in length: {list(lengths.values())}")
    if not lengths["x"]:
        raise ValueError("it holds no events")
    for key in "xy":
        if arrays[key].min() < 0 or arrays[key].max() >= _MAX_COORDINATE:
            raise ValueError(f"{key} leaves the range 0 to {_MAX_COORDINATE - 1}")
    if not np.isin(arrays["p"], (0, 1)).all():
        raise ValueError("p holds values other than 0 and 1")
    x, y = (arrays[key].astype(np.uint16) for key in "xy")
    return Events(x, y, arrays["t"], arrays["p"].astype(np.uint8))


def save_events(path: Path, events: Events) -> None:
    """Write the data set's event file (atomic): what ``load_events`` and the original read."""
    content = {
        "x": events.x.astype(np.uint16),
        "y": events.y.astype(np.uint16),
        "t": events.t,
        "p": events.p.astype(np.uint8),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.array(content, dtype=object), allow_pickle=True)


def event_images(events: Events, num_images: int) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Draw events as EventGPT does: equal counts per image, the last one takes the rest.

    Each canvas is as large as its own events need; white, darker blue, brighter red, and the later
    event of a pixel wins. Sizes therefore differ within a clip.

    Raises:
        XsdError: fewer events than images.
    """
    if len(events) < num_images:
        raise XsdError(f"{len(events)} events cannot fill {num_images} images; ask for fewer")
    share = len(events) // num_images
    bounds = [share * k for k in range(num_images)] + [len(events)]
    return [_draw(events, slice(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _draw(events: Events, part: slice) -> UInt8[np.ndarray, "H W 3"]:
    x, y, p = events.x[part].astype(np.intp), events.y[part].astype(np.intp), events.p[part]
    height, width = int(y.max()) + 1, int(x.max()) + 1
    image = np.full((height * width, 3), WHITE, np.uint8)
    # The last write of a pixel is found explicitly: numpy leaves repeated assignment undefined.
    pixel = (y * width + x)[::-1]
    seen, last = np.unique(pixel, return_index=True)
    image[seen] = np.where(p[::-1][last, None] == 0, np.uint8(BLUE), np.uint8(RED))
    return image.reshape(height, width, 3)
