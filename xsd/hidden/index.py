"""``index.json``: what a folder of chunks holds, and the hashes that prove it still does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from xsd.errors import XsdError
from xsd.files import read_json, sha256_json, write_json
from xsd.types import Split

INDEX = "index.json"
FORMAT = "xsd.hidden/1"
CHUNKS, VISUAL = "chunks", "visual"
HAS_IDS = "has_ids"
"""In a configuration: false where chunks were converted from published ones, which have none."""
CHECKSUM = "sha256"
"""Of the index's other content; the seed's index and our first ones have none."""
Half = Literal["train", "test"]
"""The two folders of an extraction; 'train' holds the val recordings too."""
SEED_QUESTIONS = 10
"""Questions a clip in chunks whose index does not say."""


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """A stored answer; ``split`` None: kept out of every split (the gap of an approximate one)."""

    key: str
    split: Split | None
    drafter_len: int | None = None
    verifier_len: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A chunk file; the seed's index knows no sizes and no hashes."""

    path: str
    start_idx: int
    samples: tuple[SampleEntry, ...]
    num_bytes: int | None = None
    sha256: str | None = None

    def fits(self, lengths: Sequence[tuple[int, int]]) -> bool:
        """Whether its answers have these (drafter's, verifier's) lengths, as far as it says."""
        told = ((sample.drafter_len, sample.verifier_len) for sample in self.samples)
        return all(None in ours or ours == found for ours, found in zip(told, lengths, strict=True))


@dataclass(frozen=True, slots=True)
class VisualEntry:
    """A file of visual states, one row a clip."""

    path: str
    scenes: tuple[str, ...]
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that could not be given."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Header:
    """What decides the content of a folder: an extraction goes on only under an equal one."""

    pair: str
    provenance: Mapping[str, str]
    conditioning: str
    dtype: str
    chunk_format: str
    d_drafter: int
    d_verifier: int
    chunk_size: int
    config: Mapping[str, Any]
    """The stage's configuration, under the seed's names where it has them."""
    plan: str
    """Digest of the samples that were to be answered, batch by batch."""


@dataclass(frozen=True, slots=True)
class Index:
    """The whole of ``index.json``."""

    header: Header
    chunks: tuple[ChunkEntry, ...] = ()
    visual: tuple[VisualEntry, ...] = ()
    failures: tuple[Failure, ...] = ()
    num_batches: int = 0
    """Batches of the plan whose answers (and failures) are in."""
    complete: bool = False
    approximate_split: bool = False

    @property
    def num_samples(self) -> int:
        return sum(len(chunk.samples) for chunk in self.chunks)

    def save(self, folder: Path) -> None:
        """Write it (atomic); the seed's own keys come first."""
        header = asdict(self.header)
        seed = {
            "total_samples": self.num_samples,
            "chunk_size": header.pop("chunk_size"),
            "chunks": [_chunk_as_dict(chunk) for chunk in self.chunks],
            "config": dict(header.pop("config")),
        }
        ours = {
            "format": FORMAT,
            "complete": self.complete,
            "num_batches": self.num_batches,
            **({"approximate_split": True} if self.approximate_split else {}),
            **header,
            "visual": [asdict(entry) for entry in self.visual],
            "failures": [asdict(failure) for failure in self.failures],
        }
        write_json(folder / INDEX, signed({**seed, **ours}))


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An index's content with the checksum that it should have."""
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    return {**rest, CHECKSUM: sha256_json(rest)}


def _chunk_as_dict(chunk: ChunkEntry) -> dict[str, Any]:
    return {
        "path": chunk.path,
        "start_idx": chunk.start_idx,
        "n_samples": len(chunk.samples),
        "num_bytes": chunk.num_bytes,
        "sha256": chunk.sha256,
        "samples": [asdict(sample) for sample in chunk.samples],
    }


def load_index(folder: Path) -> Index:
    """Read ``index.json``, ours or the seed's.

    Raises:
        XsdError: missing, unreadable, of a later format, or not an index.
    """
    path = folder / INDEX
    if not path.is_file():
        raise XsdError(f"{folder}: no {INDEX}, so it holds no hidden states; check the path")
    return parse_index(read_json(path), str(path))


def parse_index(content: Any, path: str) -> Index:
    """The content of an ``index.json`` that was found at ``path``; raises XsdError."""
    try:
        if content.get("format", FORMAT) != FORMAT:
            raise XsdError(f"{path}: format {content['format']!r}, {FORMAT!r} is read here")
        if CHECKSUM in content and content != signed(content):
            raise XsdError(f"{path}: not as it was written (its checksum differs); extract again")
        index = _own_index(content) if "format" in content else _seed_index(content)
        int(index.header.config.get("vocab_size") or 0)
    except XsdError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise XsdError(f"{path}: not an index of hidden states ({error!r})") from error
    keys = [sample.key for entry in index.chunks for sample in entry.samples]
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise XsdError(f"{path}: names {twice!r} twice; extract again")
    return index


def _own_index(content: Mapping[str, Any]) -> Index:
    names = Header.__dataclass_fields__
    if content["chunk_format"] not in ("safetensors", "pt"):
        raise ValueError(f"chunk_format {content['chunk_format']!r}")
    return Index(
        header=Header(**{name: content[name] for name in names}),
        chunks=tuple(_own_chunk(entry) for entry in content["chunks"]),
        visual=tuple(
            VisualEntry(**{**entry, "scenes": tuple(entry["scenes"])})
            for entry in content["visual"]
        ),
        failures=tuple(Failure(**entry) for entry in content["failures"]),
        num_batches=int(content["num_batches"]),
        complete=bool(content["complete"]),
        approximate_split=bool(content.get("approximate_split", False)),
    )


def _own_chunk(entry: Mapping[str, Any]) -> ChunkEntry:
    return ChunkEntry(
        path=str(entry["path"]),
        start_idx=int(entry["start_idx"]),
        samples=tuple(SampleEntry(**sample) for sample in entry["samples"]),
        num_bytes=int(entry["num_bytes"]),
        sha256=str(entry["sha256"]),
    )


def _seed_index(content: Mapping[str, Any]) -> Index:
    config = dict(content.get("config", {}))
    num_questions = int(config.get("max_questions", SEED_QUESTIONS))
    counts = [(str(entry["path"]), int(entry["n_samples"])) for entry in content["chunks"]]
    width = int(config.get("hidden_dim", 0))
    header = Header(
        pair=str(config.get("pair", "unknown")),
        provenance={},
        conditioning="free_running",
        dtype="fp32",
        chunk_format="pt",
        d_drafter=width,
        d_verifier=width,
        chunk_size=int(content.get("chunk_size", 0)),
        config=config,
        plan="",
    )
    return seed_index(header, counts, num_questions, str(config.get("split", "train")))


def seed_index(
    header: Header, counts: Sequence[tuple[str, int]], num_questions: int, split: str
) -> Index:
    """Index of chunks that name no recordings.

    Answers are counted through; ``num_questions`` in a row are a clip's. Of training data the last
    tenth of the clips is 'val', and the clip before it belongs to neither split: neighbouring
    clips overlap in time.
    """
    total = sum(count for _, count in counts)
    num_scenes = -(-total // num_questions)
    first_val = num_scenes - max(1, round(num_scenes / 10))

    def entry(position: int) -> SampleEntry:
        scene, question = divmod(position, num_questions)
        part: Split | None = "test" if split == "test" else "train"
        if part == "train" and num_scenes > 2:
            part = "val" if scene >= first_val else None if scene == first_val - 1 else "train"
        return SampleEntry(f"seed/{scene:06d}/q{question}", part)

    chunks: list[ChunkEntry] = []
    start = 0
    for path, count in counts:
        samples = tuple(entry(position) for position in range(start, start + count))
        chunks.append(ChunkEntry(path, start, samples))
        start += count
    index = Index(header, tuple(chunks), complete=True)
    return replace(index, approximate_split=split != "test")
