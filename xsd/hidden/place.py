"""A folder of hidden states wherever it is: on this machine, or in object storage by fsspec."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from xsd.errors import XsdError
from xsd.files import atomic_path, inside
from xsd.hidden.index import CHUNKS, INDEX, ChunkEntry, Index, parse_index

_BLOCK = 1 << 20
_PASSWORD = re.compile("://[^/@]*:[^/@]*@")


class Place:
    """Files of one store, by their names below it; no more than one is held here at a time."""

    def __init__(self, uri: str) -> None:
        """
        Args:
            uri: a path, or what fsspec knows: ``s3://bucket/x``, ``memory://x``, ``file:///x``.

        Raises:
            XsdError: no such protocol, its library is not installed, or the URI holds a password,
                which would be kept in logs.
        """
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        if _PASSWORD.search(uri):
            shown = _PASSWORD.sub("://***@", uri)
            raise XsdError(f"{shown}: holds a password; give it by the environment or a file")
        try:
            self._fs, self._root = url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise XsdError(f"{uri}: {error}") from error
        self.uri = uri
        self.folder = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None
        """Where it is on this machine; None: elsewhere."""

    def stores(self) -> list[Place]:
        """Itself, or the stores that lie right below it.

        Raises:
            XsdError: there is none.
        """
        if self.has(INDEX):
            return [self]
        found = self._ask(lambda: self._fs.glob(f"{self._root.rstrip('/')}/*/{INDEX}"))
        if not found:
            raise XsdError(f"{self.uri}: no {INDEX} there or right below; check the path")
        names = sorted(PurePosixPath(path).parent.name for path in found)
        return [self / name for name in names]

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.uri.rstrip('/')}/{name}")

    def index(self) -> Index:
        """
        Raises:
            XsdError: it is missing, unreadable, or no index.
        """
        if not self.has(INDEX):
            raise XsdError(f"{self.uri}: no {INDEX}, so it holds no hidden states; check the path")
        where = f"{self.uri}/{INDEX}"
        try:
            content = json.loads(self._ask(lambda: self._fs.cat_file(self._at(INDEX))))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise XsdError(f"{where}: cannot be read as JSON ({error}); check the path") from error
        return parse_index(content, where)

    def chunk_name(self, entry: ChunkEntry) -> str:
        """Where a chunk is: published ones may lie beside their index."""
        name = f"{CHUNKS}/{entry.path}"
        return entry.path if not self.has(name) and self.has(entry.path) else name

    def has(self, name: str) -> bool:
        return bool(self._ask(lambda: self._fs.isfile(self._at(name))))

    def size(self, name: str) -> int:
        return int(self._ask(lambda: self._fs.size(self._at(name))))

    def sha256(self, name: str) -> str:
        """Of a file's bytes, read in blocks."""
        digest = hashlib.sha256()

        def read() -> str:
            with self._fs.open(self._at(name), "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            return digest.hexdigest()

        return str(self._ask(read))

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The file on this machine, for as long as the block runs."""
        path = self._at(name)
        if self.folder is not None:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / PurePosixPath(name).name
            self._ask(lambda: self._fs.get_file(path, str(local)))
            yield local

    def put(self, path: Path, name: str) -> None:
        """Copy a file here; whole or absent."""
        target = self._at(name)
        if self.folder is not None:
            with atomic_path(Path(target)) as temporary:
                shutil.copyfile(path, temporary)
            return
        # Object stores show an object when it is whole.
        self._ask(lambda: self._fs.makedirs(str(PurePosixPath(target).parent), exist_ok=True))
        self._ask(lambda: self._fs.put_file(str(path), target))

    def put_index(self, index: Index) -> None:
        """Last of all: it is what makes a store."""
        with tempfile.TemporaryDirectory() as folder:
            index.save(Path(folder))
            self.put(Path(folder) / INDEX, INDEX)

    def _at(self, name: str) -> str:
        """Names come from an untrusted index."""
        if self.folder is not None:
            return str(inside(self.folder, name))
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise XsdError(f"{self.uri}: the path {name!r} leaves the folder; mend the index")
        return f"{self._root.rstrip('/')}/{name}"

    def _ask(self, what: Any) -> Any:
        try:
            return what()
        except XsdError:
            raise
        except Exception as error:
            if self.folder is not None and not isinstance(error, FileNotFoundError):
                raise
            # Every library of object storage has exceptions of its own.
            reason = " ".join(str(error).split())
            raise XsdError(f"{self.uri}: {type(error).__name__}: {reason}") from error
