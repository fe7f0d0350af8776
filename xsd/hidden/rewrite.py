"""A store in another precision or format, and several stores as one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from xsd.errors import XsdError
from xsd.files import sha256_json
from xsd.hidden.chunk import read_chunk, write_chunk
from xsd.hidden.index import (
    CHUNKS,
    HAS_IDS,
    INDEX,
    VISUAL,
    ChunkEntry,
    Header,
    Index,
    VisualEntry,
)
from xsd.hidden.place import Place
from xsd.hidden.precision import VISUAL_DTYPES
from xsd.hidden.writer import size_and_digest, write_visual


def convert(
    source: Place, target: Place, dtype: str | None = None, chunk_format: str | None = None
) -> Iterator[str]:
    """Write a store anew, chunk by chunk; yields the name of each file that is there.

    The index comes last, so what was interrupted is no store, and is begun again.

    Args:
        dtype: one of ``precision.DTYPES``; None: as it is.
        chunk_format: ``safetensors`` or ``pt`` (fp32, no ids, no visual states); None: as it is,
            published chunks become ``safetensors``.

    Raises:
        XsdError: the source is unfinished or altered, or the target holds a store.
    """
    index = _finished(source)
    _refuse_store(target)
    header = _converted(index.header, dtype, chunk_format)
    suffix = header.chunk_format
    chunks: list[ChunkEntry] = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in index.chunks:
            path = Path(folder) / f"{Path(entry.path).stem}.{suffix}"
            with source.fetched(_checked(source, source.chunk_name(entry), entry)) as old:
                chunk = read_chunk(old)
                widths = chunk.drafter_hidden.shape[1], chunk.verifier_hidden.shape[1]
                header = replace(header, d_drafter=widths[0], d_verifier=widths[1])
                samples = tuple(
                    replace(sample, drafter_len=both[0], verifier_len=both[1])
                    for sample, both in zip(entry.samples, chunk.lengths(), strict=True)
                )
                write_chunk(chunk.recoded(header.dtype), path)
            size, digest = size_and_digest(path)
            yield _move(path, target, f"{CHUNKS}/{path.name}")
            chunks.append(ChunkEntry(path.name, entry.start_idx, samples, size, digest))
        visuals: list[VisualEntry] = []
        for visual in index.visual if suffix != "pt" else ():
            name = f"{VISUAL}/{visual.path}"
            # Its last part alone: the index is not trusted, and this one is written.
            path = Path(folder) / Path(visual.path).name
            with source.fetched(_checked(source, name, visual)) as old:
                states = load_file(old)
                write_visual(
                    {kind: x.to(VISUAL_DTYPES[header.dtype]) for kind, x in states.items()}, path
                )
            size, digest = size_and_digest(path)
            yield _move(path, target, f"{VISUAL}/{path.name}")
            visuals.append(VisualEntry(path.name, visual.scenes, size, digest))
    target.put_index(replace(index, header=header, chunks=tuple(chunks), visual=tuple(visuals)))
    yield INDEX


def copy(source: Place, target: Place) -> None:
    """The same files; those that an interrupted copy left there are kept, and the index comes last.

    Raises:
        XsdError: the source is unfinished or altered.
    """
    index = _finished(source)
    files: list[tuple[str, ChunkEntry | VisualEntry]] = []
    files += [(source.chunk_name(entry), entry) for entry in index.chunks]
    files += [(f"{VISUAL}/{entry.path}", entry) for entry in index.visual]
    for name, entry in files:
        if target.has(name) and target.size(name) == source.size(name):
            continue
        with source.fetched(name) as path:
            if entry.sha256 is not None and size_and_digest(path)[1] != entry.sha256:
                raise _altered(source, name)
            target.put(path, name)
    target.put_index(index)


def merge(sources: Sequence[Place], target: Place) -> Iterator[str]:
    """Stores of one extraction's kind, one behind the other; yields each file that is there.

    Raises:
        XsdError: they differ in what decides their content, or hold an answer twice; or as
            ``convert``.
    """
    indices = [_finished(source) for source in sources]
    _refuse_store(target)
    _refuse_unlike(sources, indices)
    chunks: list[ChunkEntry] = []
    visuals: list[VisualEntry] = []
    start = 0
    for source, index in zip(sources, indices, strict=True):
        first = start
        for entry in index.chunks:
            name = source.chunk_name(entry)
            path = f"chunk_{start:06d}{Path(entry.path).suffix}"
            with source.fetched(_checked(source, name, entry)) as old:
                target.put(old, f"{CHUNKS}/{path}")
                size, digest = size_and_digest(old)
            chunks.append(replace(entry, path=path, start_idx=start, num_bytes=size, sha256=digest))
            start += len(entry.samples)
            yield f"{CHUNKS}/{path}"
        for number, visual in enumerate(index.visual):
            path = f"visual_{first:06d}_{number:04d}.safetensors"
            with source.fetched(_checked(source, f"{VISUAL}/{visual.path}", visual)) as old:
                target.put(old, f"{VISUAL}/{path}")
            visuals.append(replace(visual, path=path))
            yield f"{VISUAL}/{path}"
    plan = sha256_json([index.header.plan for index in indices])
    target.put_index(
        Index(
            replace(indices[0].header, plan=plan),
            tuple(chunks),
            tuple(visuals),
            tuple(failure for index in indices for failure in index.failures),
            sum(index.num_batches for index in indices),
            complete=True,
            approximate_split=any(index.approximate_split for index in indices),
        )
    )
    yield INDEX


def _converted(header: Header, dtype: str | None, chunk_format: str | None) -> Header:
    if chunk_format == "pt":
        if dtype not in (None, "fp32"):
            raise XsdError(f"--dtype {dtype}: chunks of the published format are fp32")
        return replace(header, dtype="fp32", chunk_format="pt")
    config = dict(header.config)
    if header.chunk_format == "pt":
        config[HAS_IDS] = False
    return replace(header, dtype=dtype or header.dtype, chunk_format="safetensors", config=config)


def _finished(source: Place) -> Index:
    index = source.index()
    if not index.complete:
        raise XsdError(f"{source.uri}: its extraction was interrupted; run it again, it goes on")
    return index


def _refuse_store(target: Place) -> None:
    if target.has(INDEX):
        raise XsdError(f"{target.uri}: holds hidden states already; give another --target")


def _refuse_unlike(sources: Sequence[Place], indices: Sequence[Index]) -> None:
    def kind(header: Header) -> dict[str, Any]:
        return {k: v for k, v in asdict(header).items() if k not in ("plan", "chunk_size")}

    seen: dict[str, Place] = {}
    for source, index in zip(sources, indices, strict=True):
        ours, theirs = kind(indices[0].header), kind(index.header)
        for name in ours:
            if ours[name] != theirs[name]:
                raise XsdError(
                    f"{source.uri}: its {name} ({theirs[name]}) is not that of {sources[0].uri} "
                    f"({ours[name]}); only extractions of one kind can be merged"
                )
        for entry in index.chunks:
            for sample in entry.samples:
                if sample.key in seen:
                    raise XsdError(
                        f"{source.uri}: answer {sample.key} is in {seen[sample.key].uri} as well"
                    )
                seen[sample.key] = source


def _checked(source: Place, name: str, entry: ChunkEntry | VisualEntry) -> str:
    """A name whose file is what the index says."""
    if entry.sha256 is not None and source.sha256(name) != entry.sha256:
        raise _altered(source, name)
    return name


def _altered(source: Place, name: str) -> XsdError:
    return XsdError(f"{source.uri}/{name}: its sha256 is not the index's; it was altered")


def _move(path: Path, target: Place, name: str) -> str:
    target.put(path, name)
    path.unlink()
    return name
