"""``xsd store``: extracted hidden states, wherever they are: checked, described, rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xsd.errors import XsdError

if TYPE_CHECKING:
    from xsd.hidden.check import Stats
    from xsd.hidden.place import Place

NAME = "store"
HELP = "Verify, describe, convert or merge stores of hidden states."
POSITIONAL = ("action", "sources...")


@dataclass(frozen=True)
class Config:
    action: Literal["verify", "stats", "convert", "merge"] = "stats"
    """First word. verify: every file against the index; stats: what is in it; convert: another
    precision or format; merge: several stores as one."""
    sources: tuple[str, ...] = ()
    """Further words: folders, runs:/ URIs, or object storage (s3://..., whatever fsspec knows)."""
    target: str | None = None
    """Where convert and merge write: a folder or object storage."""
    dtype: Literal["bf16", "fp32", "fp8"] | None = None
    """Precision that convert writes; null: as it is."""
    chunk_format: Literal["safetensors", "pt"] | None = None
    """Format that convert writes; null: safetensors."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise XsdError(f"xsd store {self.action} SOURCE ...: name a store")
        writes = self.action in ("convert", "merge")
        if writes != (self.target is not None):
            raise XsdError(
                f"xsd store {self.action}: say where to with --target"
                if writes
                else f"--target: xsd store {self.action} writes nothing"
            )
        if self.action == "convert" and len(self.sources) > 1:
            raise XsdError("xsd store convert: one source at a time")
        if self.action != "convert" and (self.dtype or self.chunk_format):
            raise XsdError(f"--dtype, --chunk_format: of xsd store convert, not {self.action}")


def run(config: Config) -> None:
    from xsd.hidden.place import Place

    if config.action == "merge":
        _merge(config)
        return
    target = None if config.target is None else Place(config.target)
    stores = [store for source in config.sources for store in _place(source).stores()]
    if config.action == "verify":
        _verify(stores)
    elif config.action == "stats":
        from xsd.hidden.check import stats

        for store in stores:
            print("\n".join(_lines(store.uri, stats(store))))
    elif target is not None:
        for store in stores:
            below = target if len(stores) == 1 else target / store.uri.rpartition("/")[2]
            _convert(store, below, config)


def _place(source: str) -> Place:
    from xsd.hidden.place import Place

    if source.startswith("runs:/"):
        from xsd.tracking import products

        return Place(str(products.load(source).path))
    return Place(source)


def _verify(stores: Sequence[Place]) -> None:
    from xsd.hidden.check import verify

    problems = 0
    for store in stores:
        found = list(verify(store))
        wrong = [checked for checked in found if checked.problem is not None]
        for checked in wrong:
            print(f"{store.uri}/{checked.name}: {checked.problem}")
        if not wrong:
            print(f"{store.uri}: {len(found)} files, all whole")
        problems += len(wrong)
    if problems:
        raise XsdError(f"{problems} files are not what the index says; extract again or mend them")


def _convert(store: Place, target: Place, config: Config) -> None:
    from xsd.hidden.check import stats
    from xsd.hidden.rewrite import convert

    before = stats(store)
    num_files = sum(1 for _ in convert(store, target, config.dtype, config.chunk_format))
    after = stats(target)
    print(
        f"{target.uri}: {num_files} files, {after.pair_bytes / 2**20:.1f} MiB of pairs "
        f"(before: {before.pair_bytes / 2**20:.1f})"
    )


def _merge(config: Config) -> None:
    from xsd.hidden.check import stats
    from xsd.hidden.place import Place
    from xsd.hidden.rewrite import merge

    sources: list[Place] = []
    for source in config.sources:
        found = _place(source).stores()
        if len(found) > 1:
            names = ", ".join(store.uri.rpartition("/")[2] for store in found)
            raise XsdError(f"{source}: holds {names}; name one of them")
        sources += found
    target = Place(str(config.target))
    for _ in merge(sources, target):
        pass
    print(f"{target.uri}: {sum(stats(target).num_answers.values())} answers")


def _lines(uri: str, found: Stats) -> list[str]:
    header, index = found.index.header, found.index
    state = "complete" if index.complete else f"unfinished, {index.num_batches} batches stored"
    splits = ", ".join(f"{count} {split}" for split, count in sorted(found.num_answers.items()))
    total = sum(found.num_answers.values())
    mean = found.num_verifier_tokens / total if total else 0.0
    share = found.pair_bytes / found.fp32_bytes if found.fp32_bytes else float("nan")
    return [
        f"{uri}: {state}",
        f"  pair        {header.pair}, {header.conditioning}, widths {header.d_drafter} and "
        f"{header.d_verifier}",
        f"  answers     {splits or 'none'}; {found.num_clips} clips, "
        f"{len(index.failures)} failures",
        f"  tokens      {found.num_verifier_tokens}, {mean:.1f} an answer, at most {found.longest}",
        f"  pairs       {found.pair_bytes} bytes in {len(index.chunks)} chunks, "
        f"{header.chunk_format} {header.dtype}: {share:.4f} of fp32",
        f"  index       {found.index_bytes} bytes",
        f"  visual      {found.visual_bytes} bytes in {len(index.visual)} files",
    ]
