"""Paired states of any size that an adapter can learn from, for benchmarks: no model is run.

Token ids follow a random table of likely successors. A verifier's state is the LM head's row of its
token, and noise; a drafter's is the verifier's, rotated, and more noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xsd.files import sha256_file
from xsd.hidden.chunk import Chunk, write_chunk
from xsd.hidden.index import CHUNKS, ChunkEntry, Header, Index, SampleEntry
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.store import HiddenStore
from xsd.types import Split

CHUNK_SIZE = 1000
MEAN, STD, SHORTEST, LONGEST = 36.9, 10.9, 5, 50
"""Answer lengths of the seed's data."""
_NUM_SUCCESSORS = 4


@dataclass(frozen=True)
class Stores:
    """The same answers twice: as we keep them, and as the seed did."""

    ours: HiddenStore
    seeds: list[Path]
    """Its padded chunks of training answers; empty unless they were asked for."""
    head: VerifierHead


def make(
    folder: Path,
    width: int,
    *,
    vocab_size: int,
    num_train: int = 0,
    num_val: int = 0,
    num_test: int = 0,
    length: int | None = None,
    as_seed: bool = False,
) -> Stores:
    """Write them. ``length``: of every answer; None: as the seed's varied."""
    world = _World(width, vocab_size)
    chunks: list[ChunkEntry] = []
    seeds: list[Path] = []
    counts: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
    for split, count in counts.items():
        for first in range(0, count, CHUNK_SIZE):
            number = min(CHUNK_SIZE, count - first)
            chunk = world.chunk(number, length)
            name = f"chunk_{len(chunks):06d}"
            path = folder / "ours" / CHUNKS / f"{name}.safetensors"
            write_chunk(chunk, path)
            samples = tuple(
                SampleEntry(f"{split}/{(first + n) // 10:06d}/q{n % 10}", split)
                for n in range(number)
            )
            start = sum(len(entry.samples) for entry in chunks)
            size = path.stat().st_size
            chunks.append(ChunkEntry(path.name, start, samples, size, sha256_file(path)))
            if as_seed and split == "train":
                seeds.append(folder / "seed" / f"{name}.pt")
                write_chunk(chunk, seeds[-1])
    header = Header(
        pair="synthetic",
        provenance={},
        conditioning="teacher_forced",
        dtype="bf16",
        chunk_format="safetensors",
        d_drafter=width,
        d_verifier=width,
        chunk_size=CHUNK_SIZE,
        config={"vocab_size": vocab_size},
        plan="",
    )
    Index(header, tuple(chunks), complete=True).save(folder / "ours")
    head = VerifierHead(world.lm_head, world.lm_head, "", "")
    return Stores(HiddenStore.open(folder / "ours"), seeds, head)


class _World:
    def __init__(self, width: int, vocab_size: int) -> None:
        self._random = torch.Generator().manual_seed(0)
        self.lm_head = self._normal(vocab_size, width)
        self._successors = torch.randint(
            vocab_size, (vocab_size, _NUM_SUCCESSORS), generator=self._random
        )
        self._rotation = torch.linalg.qr(self._normal(width, width)).Q

    def chunk(self, num_answers: int, length: int | None) -> Chunk:
        if length is None:
            drawn = MEAN + STD * self._normal(num_answers)
            lengths = drawn.round().clamp(SHORTEST, LONGEST).long()
        else:
            lengths = torch.full((num_answers,), length)
        ids = self._walk(num_answers, int(lengths.max()))
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        said = ids[real]
        verifier = self.lm_head[said] + 0.7 * self._normal(len(said), self.lm_head.shape[1])
        mixed = 0.15 * verifier + 0.6 * verifier @ self._rotation
        drafter = mixed + 0.5 * self._normal(*mixed.shape)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return Chunk(
            drafter_hidden=drafter.bfloat16(),
            verifier_hidden=verifier.bfloat16(),
            drafter_ids=said.int(),
            verifier_ids=said.int(),
            drafter_offsets=bounds.clone(),
            verifier_offsets=bounds,
        )

    def _walk(self, num_answers: int, length: int) -> Tensor:
        vocab_size = len(self._successors)
        token = torch.randint(vocab_size, (num_answers,), generator=self._random)
        said = []
        for _ in range(length):
            said.append(token)
            choice = torch.randint(_NUM_SUCCESSORS, token.shape, generator=self._random)
            token = self._successors[token, choice]
        return torch.stack(said, dim=1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)
