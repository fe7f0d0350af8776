"""What a store holds, and whether it is what its index says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xsd.errors import XsdError
from xsd.hidden.chunk import Chunk, read_chunk
from xsd.hidden.index import INDEX, VISUAL, ChunkEntry, Index, VisualEntry
from xsd.hidden.parts import KINDS
from xsd.hidden.place import Place


@dataclass(frozen=True, slots=True)
class Checked:
    """One file, and what is wrong with it; None: nothing."""

    name: str
    problem: str | None


def verify(place: Place) -> Iterator[Checked]:
    """Every file of a store against its index: size, sha256, shapes, keys, finite states.

    Memory holds one chunk at most, and of ours only what is being looked at.

    Raises:
        XsdError: there is no index.
    """
    index = place.index()
    if not index.complete:
        yield Checked(INDEX, "the extraction was interrupted; run it again, it goes on")
    else:
        yield Checked(INDEX, None)
    for entry in index.chunks:
        name = place.chunk_name(entry)
        problem = _altered(place, name, entry.num_bytes, entry.sha256)
        yield Checked(name, problem or _chunk_problem(place, name, entry, index))
    for visual in index.visual:
        name = f"{VISUAL}/{visual.path}"
        problem = _altered(place, name, visual.num_bytes, visual.sha256)
        yield Checked(name, problem or _visual_problem(place, name, visual, index))


def _altered(place: Place, name: str, num_bytes: int | None, sha256: str | None) -> str | None:
    if not place.has(name):
        return "it is missing"
    size = place.size(name)
    if num_bytes is not None and size != num_bytes:
        return f"it has {size} bytes, the index says {num_bytes}"
    if sha256 is not None and place.sha256(name) != sha256:
        return "its sha256 is not the index's"
    return None


def _chunk_problem(place: Place, name: str, entry: ChunkEntry, index: Index) -> str | None:
    with place.fetched(name) as path:
        try:
            chunk = read_chunk(path)
        except XsdError as error:
            return str(error)
        if len(chunk) != len(entry.samples):
            return f"it holds {len(chunk)} answers, the index says {len(entry.samples)}"
        if index.header.chunk_format != "pt" and not entry.fits(chunk.lengths()):
            return "the lengths of its answers are not the index's"
        for side in ("drafter", "verifier"):
            width = getattr(index.header, f"d_{side}")
            if width and getattr(chunk, f"{side}_hidden").shape[1] != width:
                return f"its {side} states are not {width} wide"
        for row, sample in enumerate(entry.samples):
            found = chunk.sample(row, sample.key)
            states = (found.drafter_hidden, found.verifier_hidden)
            if not all(bool(x.isfinite().all()) for x in states):
                return f"states of {sample.key} are not finite"
    return None


def _visual_problem(place: Place, name: str, entry: VisualEntry, index: Index) -> str | None:
    with place.fetched(name) as path:
        try:
            states = load_file(path)
        except (OSError, SafetensorError) as error:
            return f"it cannot be read ({error})"
        if set(states) != set(KINDS):
            return f"it does not hold {' and '.join(KINDS)} states"
        for kind, rows in states.items():
            shape = (len(entry.scenes), index.header.d_verifier)
            if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != shape:
                return f"its {kind} states are {tuple(rows.shape)}, not of {shape[0]} clips"
            if not bool(rows.isfinite().all()):
                return f"its {kind} states are not finite"
    return None


@dataclass(frozen=True)
class Stats:
    """Numbers of a store."""

    index: Index
    num_answers: dict[str, int]
    """By split; answers of no split under "none"."""
    num_drafter_tokens: int
    num_verifier_tokens: int
    longest: int
    pair_bytes: int
    """Of the chunks."""
    index_bytes: int
    visual_bytes: int
    """Of what all questions of a clip share."""
    num_clips: int

    @property
    def fp32_bytes(self) -> int:
        """What the real positions of both sides would take in fp32, without ids and padding."""
        header = self.index.header
        drafter = self.num_drafter_tokens * header.d_drafter
        return 4 * (drafter + self.num_verifier_tokens * header.d_verifier)


def stats(place: Place) -> Stats:
    """Read off the index; only chunks that it gives no lengths of are opened.

    Raises:
        XsdError: there is no index, or such a chunk cannot be read.
    """
    index = place.index()
    splits = Counter(str(s.split).lower() for entry in index.chunks for s in entry.samples)
    nothing = torch.zeros(0, dtype=torch.long)
    lengths = [(nothing, nothing), *(_lengths(place, entry) for entry in index.chunks)]
    drafter, verifier = (torch.cat(side) for side in zip(*lengths, strict=True))
    return Stats(
        index,
        dict(splits),
        int(drafter.sum()),
        int(verifier.sum()),
        int(verifier.max()) if len(verifier) else 0,
        sum(place.size(place.chunk_name(entry)) for entry in index.chunks),
        place.size(INDEX),
        sum(entry.num_bytes for entry in index.visual),
        len({key.rpartition("/")[0] for e in index.chunks for key in (s.key for s in e.samples)}),
    )


def _lengths(place: Place, entry: ChunkEntry) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer lengths of the two sides [answers]."""
    told = [(sample.drafter_len, sample.verifier_len) for sample in entry.samples]
    if all(None not in both for both in told):
        sides = torch.tensor(told, dtype=torch.long)
        return sides[:, 0], sides[:, 1]
    with place.fetched(place.chunk_name(entry)) as path:
        chunk: Chunk = read_chunk(path)
        return chunk.drafter_offsets.diff(), chunk.verifier_offsets.diff()
