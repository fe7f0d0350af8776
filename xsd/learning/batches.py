"""Hidden states on disk -> batches of a level's streams."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from xsd.adapters.base import Streams
from xsd.adapters.catalog import Level
from xsd.adapters.collate import Answers
from xsd.errors import XsdError
from xsd.hidden.ahead import ahead
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.store import HiddenStore
from xsd.learning.cpu import product
from xsd.pairs.device import free_bytes

WINDOW_BYTES = 2 << 30
"""So many bytes of chunks are shuffled together; smaller data is shuffled as a whole."""
ALIKE = 4
"""So many batches' answers are sorted by length before they are cut into batches: attention pads
to a batch's longest answer."""
_AHEAD = 2
"""Ordered batches that are read before they are asked for."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer step's answers, or a process's share of them."""

    streams: Streams
    lengths: tuple[int, ...]
    """Of all answers of the step, whoever holds them."""
    is_idle: bool = False
    """There are fewer answers than processes: ``streams`` are for form and must not count."""


def check_level(store: HiddenStore, row: Level) -> None:
    """Refuse a level that reads what the chunks do not hold.

    Raises:
        XsdError: the level, by name, and what it lacks.
    """
    lacking = []
    if "token" in row.streams and not store.has_ids:
        lacking.append("token ids")
    if row.visual and not store.has_visual:
        lacking.append(f"{row.visual} visual states")
    if lacking:
        raise XsdError(
            f"{store.path}: level {row.name} reads {' and '.join(lacking)}, which chunks of the "
            "published format do not hold; extract with --chunk_format safetensors"
        )


@dataclass(frozen=True, slots=True)
class _Pool:
    """Answers that are sorted by length and cut into batches, and the order these come in."""

    keys: tuple[str, ...]
    order: tuple[int, ...]


class TrainBatches:
    """Shuffled training batches: an epoch's depend on seed, epoch and answers alone.

    Chunks are shuffled, as many of them as fit into ``window_bytes`` are read together, and their
    answers are shuffled across them. Only the last batch of an epoch may be short. How much memory
    there is decides where answers wait, and nothing else: all of them on the device for good, or a
    window of them while a thread reads the next.
    """

    def __init__(
        self,
        store: HiddenStore,
        row: Level,
        *,
        batch_size: int,
        seed: int,
        head: VerifierHead | None = None,
        window_bytes: int = WINDOW_BYTES,
        device: torch.device | str = "cpu",
        room: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Prepare; nothing is read before the first batch.

        Args:
            head: for levels that read token embeddings.
            device: where batches are made.
            room: bytes that answers may take there for good; None: half of what is free.
            share: number of this process, and of all that train together.

        Raises:
            XsdError: the level reads what is not there, or nothing is in the train split.
        """
        check_level(store, row)
        self._store, self._row, self._head = store, row, head
        self._batch_size, self._seed, self._share = batch_size, seed, share
        self._device = torch.device(device)
        self._chunks = store.keys_by_chunk("train")
        if not self._chunks:
            raise XsdError(f"{store.path}: its train split is empty; extract more recordings")
        self._chunks_together = max(1, window_bytes * len(self._chunks) // store.num_bytes)
        free = free_bytes(self._device) // 2 if room is None else room
        self.is_resident = store.num_bytes <= free
        self._held: dict[str, tuple[Answers, int]] = {}

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-sum(map(len, self._chunks)) // self._batch_size)

    def __call__(self, epoch: int, skip: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, without the first ``skip``."""
        windows: list[list[_Pool]] = []
        for window in self._windows(epoch):
            if not windows and skip >= (num := sum(len(pool.order) for pool in window)):
                skip -= num
            else:
                windows.append(window)
        for window, held in zip(windows, ahead(map(self._hold, windows)), strict=True):
            for pool in window:
                by_length = sorted(pool.keys, key=lambda key: _length(held[key]))
                for number in pool.order:
                    if skip:
                        skip -= 1
                        continue
                    first = number * self._batch_size
                    yield self._batch(held, by_length[first : first + self._batch_size])

    def _windows(self, epoch: int) -> Iterator[list[_Pool]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._chunks)).tolist()
        size, waiting = self._batch_size, list[str]()
        for start in range(0, len(order), self._chunks_together):
            together = order[start : start + self._chunks_together]
            keys = [key for number in together for key in self._chunks[number]]
            waiting += [keys[position] for position in rng.permutation(len(keys))]
            pools = []
            while len(waiting) >= size:
                num = min(ALIKE, len(waiting) // size)
                drawn = tuple(rng.permutation(num).tolist())
                pools.append(_Pool(tuple(waiting[: num * size]), drawn))
                waiting = waiting[num * size :]
            if waiting and start + self._chunks_together >= len(order):
                pools.append(_Pool(tuple(waiting), (0,)))
            yield pools

    def _hold(self, window: Sequence[_Pool]) -> dict[str, tuple[Answers, int]]:
        """A window's answers on the device; all there are, where they fit."""
        if self.is_resident:
            if not self._held:
                self._held = self._load([key for keys in self._chunks for key in keys])
            return self._held
        return self._load([key for pool in window for key in pool.keys])

    def _load(self, keys: Sequence[str]) -> dict[str, tuple[Answers, int]]:
        answers = _answers(self._store, self._row, self._head, keys).to(self._device)
        return {key: (answers, number) for number, key in enumerate(keys)}

    def _batch(self, held: dict[str, tuple[Answers, int]], keys: Sequence[str]) -> TrainBatch:
        number, num_processes = self._share
        mine = keys[number::num_processes]
        answers, _ = held[keys[0]]
        streams = answers.batch([held[key][1] for key in mine or keys[:1]])
        return TrainBatch(streams, tuple(_length(held[key]) for key in keys), not mine)


class OrderedBatches:
    """Given answers in stored order, for scoring; may be iterated again and again.

    Chunks without token ids get those that the LM head reads off the verifier's states: for greedy
    answers these are the same, up to rounding.
    """

    def __init__(
        self,
        store: HiddenStore,
        row: Level,
        keys: Sequence[str],
        *,
        batch_size: int,
        head: VerifierHead | None = None,
        share: tuple[int, int] = (0, 1),
        done: Collection[int] = (),
    ) -> None:
        """Cut the answers into batches, and take those of this process.

        Args:
            share: number of this process, and of all; whole batches are shared out.
            done: numbers of batches that nobody wants any more.

        Raises:
            XsdError: the level reads what is not there, or there is nothing to batch.
        """
        check_level(store, row)
        if batch_size < 1:
            raise XsdError(f"batch_size={batch_size}: must be at least 1")
        if not keys:
            raise XsdError(f"{store.path}: no answers to score; extract that split")
        self._store, self._row, self._head = store, row, head
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        wanted = [number for number in range(len(batches)) if number not in done]
        self.numbers = wanted[share[0] :: share[1]]
        """Place of every batch among those of all processes."""
        self.batches = [batches[number] for number in self.numbers]
        """Keys of every batch."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Streams]:
        return ahead(map(self._read, self.batches), _AHEAD)

    def _read(self, keys: Sequence[str]) -> Streams:
        streams = _answers(self._store, self._row, self._head, keys).batch()
        if not self._store.has_ids and self._head is not None:
            ids = product(streams.verifier, self._head.lm_head).argmax(-1)
            streams = replace(streams, ids=ids)
        return streams


def held_out_keys(store: HiddenStore) -> tuple[str, ...]:
    """Answers of a store that was handed in for validation: its val split, its test split, or all.

    Our train folders hold the training answers too, which must not be validated on.
    """
    if store.approximate_split:
        return store.keys()
    return store.keys("val") or store.keys("test") or store.keys()


def _answers(
    store: HiddenStore, row: Level, head: VerifierHead | None, keys: Sequence[str]
) -> Answers:
    samples = [store.sample(key) for key in keys]
    visuals = None
    if row.visual:
        scenes = dict.fromkeys(sample.scene_key for sample in samples)
        visuals = {scene: store.visual(scene) for scene in scenes}
    embedding = None if head is None else head.embed_tokens
    return Answers(samples, row, embedding=embedding, visuals=visuals)


def _length(held: tuple[Answers, int]) -> int:
    answers, number = held
    return answers.lengths[number]
