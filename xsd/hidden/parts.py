"""Answered batches that are not in a chunk yet, a file each, in a hidden folder.

Any number of processes may add parts: each batch is one process's, and its file is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xsd.errors import XsdError
from xsd.files import atomic_path, sha256_json
from xsd.hidden.chunk import Chunk
from xsd.hidden.index import Failure, Header
from xsd.hidden.plan import Extracted
from xsd.hidden.precision import VISUAL_DTYPES

PARTS = ".parts"
KINDS = ("projected", "prefilled")


@dataclass(frozen=True, slots=True)
class Part:
    """A stored batch; its tensors stay on disk."""

    path: Path
    keys: tuple[str, ...]
    scenes: tuple[str, ...]
    failures: tuple[Failure, ...]

    def load(self) -> tuple[Chunk | None, dict[str, Tensor]]:
        """Its answers, as they will be stored, and its clips' visual states by kind.

        Raises:
            XsdError: another process took it away.
        """
        try:
            tensors = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise XsdError(f"{self.path}: cannot be read ({error}); extract again") from error
        chunk = Chunk.from_tensors(tensors) if self.keys else None
        return chunk, {kind: tensors[kind] for kind in KINDS if self.scenes}


class Parts:
    """The parts of one extraction."""

    def __init__(self, folder: Path, header: Header) -> None:
        """``folder``: the extraction's; nothing is written yet."""
        self.folder = folder / PARTS
        self._header = header
        # As JSON, because that is how a stored header was read.
        self._identity = sha256_json(asdict(header))

    def path(self, number: int) -> Path:
        """Where batch ``number`` of the plan is, or will be."""
        return self.folder / f"part_{number:06d}.safetensors"

    def write(self, number: int, extracted: Extracted) -> Part:
        """Keep a batch. The disk may have it later: what is damaged is found by its checksum."""
        dtype = self._header.dtype
        tensors: dict[str, Tensor] = {}
        if extracted.samples:
            tensors |= Chunk.of(extracted.samples, dtype).tensors()
        for kind in KINDS if extracted.visuals else ():
            states = torch.stack([getattr(visual, kind) for visual in extracted.visuals])
            tensors[kind] = states.to(VISUAL_DTYPES[dtype])
        about = {
            "identity": self._identity,
            "keys": [sample.key for sample in extracted.samples],
            "scenes": [visual.scene_key for visual in extracted.visuals],
            "failures": [asdict(failure) for failure in extracted.failures],
            "sha256": _digest(tensors),
        }
        path = self.path(number)
        with atomic_path(path, durable=False) as temporary:
            save_file(tensors, temporary, metadata={"xsd": json.dumps(about)})
        return _part(path, about)

    def read(self, number: int, *, verify: bool) -> Part | None:
        """The part, if it is there, whole, and of this extraction.

        Args:
            verify: compare its checksum; what a running process has just written needs none.
        """
        path = self.path(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("xsd", "{}"))
            if about.get("identity") != self._identity:
                return None
            if verify and _digest(load_file(path)) != about["sha256"]:
                return None
            return _part(path, about)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None


def _part(path: Path, about: Mapping[str, Sequence[object]]) -> Part:
    failures = tuple(Failure(**failure) for failure in about["failures"])  # type: ignore[arg-type]
    return Part(path, tuple(map(str, about["keys"])), tuple(map(str, about["scenes"])), failures)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        content: Any = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()
