"""Paired hidden states on disk: quick to open, checked when read, mapped rather than loaded."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xsd.errors import XsdError
from xsd.files import inside, sha256_file, sha256_json
from xsd.hidden.chunk import Chunk, read_chunk
from xsd.hidden.index import (
    CHUNKS,
    HAS_IDS,
    INDEX,
    SEED_QUESTIONS,
    VISUAL,
    ChunkEntry,
    Failure,
    Half,
    Header,
    Index,
    load_index,
    seed_index,
)
from xsd.hidden.sample import ClipVisual, HiddenSample
from xsd.types import Split

_UNPACKED_BYTES = 4 << 30
"""Chunks of the published format are unpacked into memory; so much is kept of them."""


def folder_name(half: Half, quant: str) -> str:
    """``chunked_train_1s_4bit``: the published name."""
    return f"chunked_{half}_1s_{quant}"


def find_folder(path: Path, half: Half) -> Path:
    """The folder (or single ``.pt`` file) of hidden states at ``path`` or just below it.

    Raises:
        XsdError: there is none, or more than one.
    """
    if path.is_file() or (path / INDEX).is_file():
        return path
    found = sorted(p.parent for p in path.glob(f"chunked_{half}_*/{INDEX}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise XsdError(f"{path}: holds {', '.join(p.name for p in found)}; name one of them")
    raise XsdError(f"{path}: no hidden states of the {half} split; extract them or check the path")


class HiddenStore:
    """A finished extraction, ours or one in the published format.

    Attributes:
        path: its folder (or single file).
        header: pair, widths, precision and configuration.
        failures: answers that could not be given.
        approximate_split: 'val' is a tail of clips, not of recordings.
    """

    def __init__(self, path: Path, index: Index, *, verify: bool) -> None:
        self.path = path
        self.header: Header = index.header
        self.failures: tuple[Failure, ...] = index.failures
        self.approximate_split = index.approximate_split
        self._index = index
        self._verify = verify
        self._root = path if path.is_dir() else path.parent
        self._files = [self._locate(entry) for entry in index.chunks]
        self._loaded: OrderedDict[int, Chunk] = OrderedDict()
        self._visuals: dict[str, dict[str, Tensor]] = {}
        self._where = {
            sample.key: (number, row)
            for number, entry in enumerate(index.chunks)
            for row, sample in enumerate(entry.samples)
        }
        self._scenes = {
            scene: (entry, row) for entry in index.visual for row, scene in enumerate(entry.scenes)
        }

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> HiddenStore:
        """Read the index, compare sizes; with ``verify``, hash each chunk when it is first read.

        Raises:
            XsdError: no index or an unfinished one, a chunk that is missing or has another size,
                a path that leaves the folder.
        """
        if path.is_file() and path.suffix == ".pt":
            return cls(path, _single(path), verify=verify)
        index = load_index(path)
        if not index.complete:
            raise XsdError(f"{path}: its extraction was interrupted; run it again, it goes on")
        store = cls(path, index, verify=verify)
        if not len(store):
            raise XsdError(f"{path}: holds no answers; extract again")
        if not index.header.d_verifier:
            store.header = _with_widths(index.header, store._chunk(0))
        return store

    @property
    def d_drafter(self) -> int:
        return self.header.d_drafter

    @property
    def d_verifier(self) -> int:
        return self.header.d_verifier

    @property
    def vocab_size(self) -> int | None:
        """Ids that the pair chose among; None: published chunks, which do not say."""
        found = self.header.config.get("vocab_size")
        return None if found is None else int(found)

    @property
    def has_ids(self) -> bool:
        return self.header.chunk_format != "pt" and self.header.config.get(HAS_IDS, True)

    @property
    def has_visual(self) -> bool:
        return bool(self._scenes)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    @property
    def num_visual_bytes(self) -> int:
        """Of the visual states, which the questions of a clip share."""
        return sum(entry.num_bytes for entry in self._index.visual)

    @property
    def digest(self) -> str:
        """Equal for equal content, whatever interrupted its making."""
        chunks = [
            entry.sha256 or path.stat().st_size
            for entry, path in zip(self._index.chunks, self._files, strict=True)
        ]
        samples = [(s.key, s.split) for entry in self._index.chunks for s in entry.samples]
        visual = [entry.sha256 for entry in self._index.visual]
        return sha256_json([self.header.conditioning, chunks, samples, visual])

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[HiddenSample]:
        return (self.sample(key) for key in self._where)

    def keys(self, split: Split | None = None) -> tuple[str, ...]:
        """Keys of a split, or all, in stored order."""
        return tuple(key for keys in self.keys_by_chunk(split) for key in keys)

    def keys_by_chunk(self, split: Split | None = None) -> tuple[tuple[str, ...], ...]:
        """The same, a tuple a chunk; chunks without such answers are left out."""
        chunks = (
            tuple(s.key for s in entry.samples if split is None or s.split == split)
            for entry in self._index.chunks
        )
        return tuple(keys for keys in chunks if keys)

    def sample(self, key: str) -> HiddenSample:
        """One answer.

        Raises:
            XsdError: no such key, or its chunk was truncated or altered.
        """
        if key not in self._where:
            raise XsdError(f"{self.path}: holds no sample {key!r}")
        number, row = self._where[key]
        return self._chunk(number).sample(row, key)

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Let the system fetch the chunks of these answers while others are being used."""
        for number in dict.fromkeys(self._where[key][0] for key in keys):
            with self._files[number].open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def visual(self, scene_key: str) -> ClipVisual:
        """What the verifier saw of a clip.

        Raises:
            XsdError: none were kept, or their file was altered.
        """
        if scene_key not in self._scenes:
            raise XsdError(f"{self.path}: no visual states of clip {scene_key!r}; extract again")
        entry, row = self._scenes[scene_key]
        if entry.path not in self._visuals:
            path = inside(self.path, f"{VISUAL}/{entry.path}")
            _check(path, entry.num_bytes, entry.sha256 if self._verify else None)
            self._visuals[entry.path] = _load_visual(path)
        states = self._visuals[entry.path]
        return ClipVisual(scene_key, states["projected"][row], states["prefilled"][row])

    def _chunk(self, number: int) -> Chunk:
        if number in self._loaded:
            self._loaded.move_to_end(number)
            return self._loaded[number]
        entry, path = self._index.chunks[number], self._files[number]
        if self._verify and entry.sha256 is not None:
            _check(path, entry.num_bytes, entry.sha256)
        chunk = read_chunk(path)
        if len(chunk) != len(entry.samples):
            raise XsdError(f"{path}: holds {len(chunk)} answers, its index {len(entry.samples)}")
        if self.header.chunk_format != "pt" and not entry.fits(chunk.lengths()):
            raise XsdError(f"{path}: its answers' lengths are not its index's; extract again")
        widths = chunk.drafter_hidden.shape[1], chunk.verifier_hidden.shape[1]
        if self.d_verifier and widths != (self.d_drafter, self.d_verifier):
            raise XsdError(f"{path}: states {widths} wide, not what its index says; extract again")
        self._loaded[number] = chunk
        while path.suffix == ".pt" and len(self._loaded) > 1 and self._unpacked() > _UNPACKED_BYTES:
            self._loaded.popitem(last=False)
        return chunk

    def _unpacked(self) -> int:
        return sum(x.nbytes for chunk in self._loaded.values() for x in chunk.tensors().values())

    def _locate(self, entry: ChunkEntry) -> Path:
        path = inside(self._root, f"{CHUNKS}/{entry.path}")
        if not path.is_file():
            path = inside(self._root, entry.path)
        _check(path, entry.num_bytes, None)
        return path


def _single(path: Path) -> Index:
    chunk = read_chunk(path)
    header = Header(
        pair="unknown",
        provenance={},
        conditioning="free_running",
        dtype="fp32",
        chunk_format="pt",
        d_drafter=chunk.drafter_hidden.shape[1],
        d_verifier=chunk.verifier_hidden.shape[1],
        chunk_size=len(chunk),
        config={},
        plan="",
    )
    return seed_index(header, [(path.name, len(chunk))], SEED_QUESTIONS, "train")


def _with_widths(header: Header, chunk: Chunk) -> Header:
    widths = chunk.drafter_hidden.shape[1], chunk.verifier_hidden.shape[1]
    return replace(header, d_drafter=widths[0], d_verifier=widths[1])


def _check(path: Path, num_bytes: int | None, sha256: str | None) -> None:
    if not path.is_file():
        raise XsdError(f"{path}: missing, though the index names it; extract again")
    size = path.stat().st_size
    if num_bytes is not None and size != num_bytes:
        raise XsdError(
            f"{path}: {size} bytes, the index says {num_bytes}; it was cut off or altered"
        )
    if sha256 is not None and sha256_file(path) != sha256:
        raise XsdError(f"{path}: its sha256 is not the index's; it was altered, extract again")


def _load_visual(path: Path) -> dict[str, Float[Tensor, "clips K Dv"]]:
    try:
        states = load_file(path)
    except (OSError, SafetensorError) as error:
        raise XsdError(f"{path}: cannot be read ({error}); extract again") from error
    if set(states) != {"projected", "prefilled"}:
        raise XsdError(f"{path}: does not hold projected and prefilled states; extract again")
    return states
