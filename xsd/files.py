"""Files that are whole or absent: atomic writes, checksums, and paths that stay in their folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xsd.errors import XsdError


def make_folder(folder: Path) -> Path:
    """The folder, made with those above it where it is not there.

    Raises:
        XsdError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XsdError(
            f"{folder}: cannot be made ({error.strerror}); choose another place"
        ) from error
    return folder


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success fsync it and rename it into place.

    An error inside the block leaves ``path`` as it was and removes the temporary file; where the
    disk is full that is an OSError which names ``path``, whichever library met it. Without
    ``durable`` nobody waits for the disk: that survives the death of the process, not of the
    machine.

    Raises:
        XsdError: the folder of ``path`` cannot be made.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    except Exception as error:
        if number := _want_of_room(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _want_of_room(error: BaseException | None) -> int | None:
    """The errno behind a failed write, if it is that the disk is full.

    safetensors tells it in words alone, and torch covers the first error by a later one.
    """
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return number
        error = error.__cause__ or error.__context__
    return None


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), sorted as given, readable by people."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        XsdError: the file is missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise XsdError(f"{path}: cannot be read as JSON ({error}); check the path") from error


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def inside(root: Path, relative: str) -> Path:
    """Resolve a path from an untrusted index.

    Raises:
        XsdError: the path is absolute or leaves ``root`` (through ``..`` or a link).
    """
    base = root.resolve()
    target = (base / relative).resolve()
    if Path(relative).is_absolute() or not target.is_relative_to(base):
        raise XsdError(f"{root}: the path {relative!r} leaves the folder; remove it from the index")
    return target
