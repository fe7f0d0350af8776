"""Event files and event images, as EventGPT reads and draws them."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import tokenize
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt16

from xsd.errors import XsdError
from xsd.files import atomic_path

_PALETTE = np.array([(0, 0, 255), (255, 0, 0)], np.uint8)
"""Blue for darker, red for brighter."""
_MAX_COORDINATE = 1 << 14
_INTEGERS = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")


@dataclass(frozen=True)
class Events:
    """What an event camera reported, in order of time."""

    x: UInt16[np.ndarray, " n"]
    y: UInt16[np.ndarray, " n"]
    t: Int64[np.ndarray, " n"]
    """Microseconds."""
    p: UInt8[np.ndarray, " n"]
    """Polarity: 1 brighter, 0 darker."""

    def __len__(self) -> int:
        return len(self.x)


class _Dtype:
    """Stands in for a pickled dtype: its code, and after the state its byte order."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands in for a pickled array: inert parts, from which ``_numbers`` builds the real one."""

    shape: object = None
    dtype: object = None
    data: object = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, _, self.data = state


def _reconstruct(*_: object) -> _Array:
    return _Array()


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds arrays as stand-ins, and plain values; refuses whatever else the stream names.

    No function of numpy is called with arguments from the stream, let alone anyone else's.
    """

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no event file needs")
        return known[module, name]


def load_events(path: Path) -> Events:
    """Read an event clip: a dict of x, y, t, p in a 0-d object array, which numpy pickles.

    The pickle is read by an unpickler that knows arrays of integers only.

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


_OPCODES = re.compile(
    "PROTO|FRAME|STOP|(STACK_)?GLOBAL|REDUCE|BUILD|MARK|(EMPTY_)?TUPLE[123]?|EMPTY_(LIST|DICT)"
    "|APPENDS?|SETITEMS?|NONE|NEW(TRUE|FALSE)|BININT[12]?|LONG1|BINFLOAT|(SHORT_)?BINUNICODE"
    "|(SHORT_)?BINBYTES8?|(LONG_)?BIN(PUT|GET)|MEMOIZE"
)
"""The pickle opcodes that arrays and dicts need."""
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
    SyntaxError,
    tokenize.TokenError,
)
"""What a damaged or hostile file makes the header parser and the unpickler raise."""


def _unpickle(handle: BinaryIO) -> Any:
    version = np.lib.format.read_magic(handle)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(handle)
    else:
        raise ValueError(f"npy format {version[0]}.{version[1]}")
    if shape != () or dtype != np.dtype(object):
        raise ValueError(f"an array of {dtype} and shape {shape}, not a dict in a 0-d object array")
    stream = handle.read()
    _check_opcodes(stream)
    outer = _ArraysOnly(io.BytesIO(stream)).load()
    if not isinstance(outer, _Array) or not isinstance(outer.data, list) or len(outer.data) != 1:
        raise ValueError("the pickle does not hold a 0-d object array")
    return outer.data[0]


def _check_opcodes(stream: bytes) -> None:
    """Refuse what arrays and dicts do not need, before any of it costs memory."""
    for opcode, argument, _ in pickletools.genops(stream):
        if not _OPCODES.fullmatch(opcode.name):
            raise ValueError(f"its pickle uses {opcode.name}, which no event file needs")
        if opcode.name == "LONG_BINPUT" and (argument or 0) > len(stream):
            raise ValueError("its pickle claims more objects than it has bytes")


def _checked(content: Any) -> Events:
    if not isinstance(content, dict):
        raise ValueError("the array does not hold a dict with x, y, t, p")
    missing = [key for key in "xytp" if key not in content]
    if missing:
        raise ValueError(f"no {', '.join(missing)} among the keys {sorted(map(str, content))}")
    x, y, t, p = (_numbers(key, content[key]) for key in "xytp")
    if not len(x) == len(y) == len(t) == len(p):
        raise ValueError(f"x, y, t, p differ in length: {[len(x), len(y), len(t), len(p)]}")
    if not len(x):
        raise ValueError("it holds no events")
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= _MAX_COORDINATE:
        raise ValueError(f"x or y leaves the range 0 to {_MAX_COORDINATE - 1}")
    if not np.isin(p, (0, 1)).all():
        raise ValueError("p holds values other than 0 and 1")
    return Events(x.astype(np.uint16), y.astype(np.uint16), t.astype(np.int64), p.astype(np.uint8))


def _numbers(key: str, array: Any) -> Shaped[np.ndarray, " n"]:
    """The real array of a stand-in, if it is a row of integers."""
    kind = getattr(array, "dtype", None)
    code, order = getattr(kind, "code", None), getattr(kind, "order", None)
    if code not in _INTEGERS or order not in ("<", ">", "|", "="):
        raise ValueError(f"{key} is not an array of integers")
    dtype, data, shape = np.dtype(f"{order}{code}"), array.data, array.shape
    if not isinstance(data, bytes) or shape != (len(data) // dtype.itemsize,):
        raise ValueError(f"{key} is not a complete one-dimensional array")
    if len(data) % dtype.itemsize:
        raise ValueError(f"{key} is cut short")
    return np.frombuffer(data, dtype)


def save_events(path: Path, events: Events) -> None:
    """Write the data set's event file (atomic): what ``load_events`` and the original read."""
    content = {
        "x": events.x.astype(np.uint16),
        "y": events.y.astype(np.uint16),
        "t": events.t.astype(np.uint32),
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
    return [_draw(events, slice(first, end)) for first, end in pairwise(bounds)]


def _draw(events: Events, part: slice) -> UInt8[np.ndarray, "H W 3"]:
    x, y, p = events.x[part].astype(np.intp), events.y[part].astype(np.intp), events.p[part]
    height, width = int(y.max()) + 1, int(x.max()) + 1
    image = np.full((height * width, 3), 255, np.uint8)
    # The last write of a pixel is found explicitly: numpy leaves repeated assignment undefined.
    pixel = (y * width + x)[::-1]
    seen, last = np.unique(pixel, return_index=True)
    image[seen] = _PALETTE[p[::-1][last]]
    return image.reshape(height, width, 3)
