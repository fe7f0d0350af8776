"""How kernels are compiled, and where the result is kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import config, njit


def _folder() -> Path | None:
    """One for each version of the kernels; None: nothing can be written.

    Numba looks at the file of the function it is about to load, and at none of those it calls.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    caches = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "xsd" / "kernels" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


_FOLDER = _folder()
_COMMON: dict[str, Any] = {"cache": _FOLDER is not None, "error_model": "numpy", "nogil": True}


@contextmanager
def _kept_here() -> Iterator[None]:
    before, config.CACHE_DIR = config.CACHE_DIR, str(_FOLDER or "")
    try:
        yield
    finally:
        config.CACHE_DIR = before


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    with _kept_here():
        return njit(**_COMMON, **options)(function)


def exact(function: Callable[..., Any]) -> Any:
    """Every sum in the order in which it is written, with fused multiply-adds."""
    return _compile(function, fastmath={"contract"})


def inner(function: Callable[..., Any]) -> Any:
    """The same for what kernels call: nothing may be allocated.

    So references to slices of arrays need no counting: its atomic operations cost more than the
    arithmetic of a row.
    """
    return _compile(function, fastmath={"contract"}, _nrt=False)


def reorder(function: Callable[..., Any]) -> Any:
    """Sums and maxima of one row, in an order of the compiler's, the same for every row."""
    return _compile(function, fastmath={"contract", "reassoc", "nnan", "nsz"}, _nrt=False)
