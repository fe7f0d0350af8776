"""Hidden states on disk -> batches of a level's streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from xsd.adapters.base import Streams
from xsd.adapters.catalog import Level
from xsd.adapters.collate import collate
from xsd.errors import XsdError
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.store import HiddenStore

RESIDENT_BYTES = 2 << 30
"""So many bytes of chunks are shuffled together; smaller data is shuffled as a whole."""
ALIKE = 4
"""So many batches' answers are sorted by length before they are cut into batches: a batch is as
long as its longest answer, and of random ones a third would be padding."""


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


class TrainBatches:
    """Shuffled training batches: ``batches(epoch)`` depends on seed and epoch alone.

    Chunks are shuffled, as many of them as fit into ``resident_bytes`` are read together, and
    their answers are shuffled across them. Only the last batch of an epoch may be short.
    """

    def __init__(
        self,
        store: HiddenStore,
        row: Level,
        *,
        batch_size: int,
        seed: int,
        head: VerifierHead | None = None,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        """``head``: for levels that read token embeddings.

        Raises:
            XsdError: the level reads what is not there, or nothing is in the train split.
        """
        check_level(store, row)
        self._store, self._row, self._head = store, row, head
        self._batch_size, self._seed = batch_size, seed
        self._chunks = store.keys_by_chunk("train")
        if not self._chunks:
            raise XsdError(f"{store.path}: its train split is empty; extract more recordings")
        self._chunks_together = max(1, resident_bytes * len(self._chunks) // store.num_bytes)

    def __call__(self, epoch: int) -> Iterator[Streams]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._chunks)).tolist()
        size = self._chunks_together
        windows = [
            [key for number in order[start : start + size] for key in self._chunks[number]]
            for start in range(0, len(order), size)
        ]
        waiting: list[str] = []
        for window, following in zip(windows, [*windows[1:], []], strict=True):
            self._store.read_ahead(following)
            waiting += [window[position] for position in rng.permutation(len(window))]
            while len(waiting) >= self._batch_size:
                num = self._batch_size * min(ALIKE, len(waiting) // self._batch_size)
                for keys in self._alike(waiting[:num], rng):
                    yield _batch(self._store, self._row, self._head, keys)
                waiting = waiting[num:]
        if waiting:
            yield _batch(self._store, self._row, self._head, waiting)

    def _alike(self, keys: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
        """Full batches of answers of like length, in random order."""
        by_length = sorted(keys, key=lambda key: len(self._store.sample(key).verifier_ids))
        size = self._batch_size
        return [by_length[n * size : (n + 1) * size] for n in rng.permutation(len(keys) // size)]


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
    ) -> None:
        """Raises XsdError if the level reads what is not there, or there is nothing to batch."""
        check_level(store, row)
        if batch_size < 1:
            raise XsdError(f"batch_size={batch_size}: must be at least 1")
        if not keys:
            raise XsdError(f"{store.path}: no answers to score; extract that split")
        self._store, self._row, self._head = store, row, head
        self.batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        """Keys of every batch."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Streams]:
        for keys in self.batches:
            streams = _batch(self._store, self._row, self._head, keys)
            if not self._store.has_ids and self._head is not None:
                ids = (streams.verifier @ self._head.lm_head.T).argmax(-1)
                streams = replace(streams, ids=ids)
            yield streams


def held_out_keys(store: HiddenStore) -> tuple[str, ...]:
    """Answers of a store that was handed in for validation: its val split, its test split, or all.

    Our train folders hold the training answers too, which must not be validated on.
    """
    if store.approximate_split:
        return store.keys()
    return store.keys("val") or store.keys("test") or store.keys()


def _batch(
    store: HiddenStore, row: Level, head: VerifierHead | None, keys: Sequence[str]
) -> Streams:
    samples = [store.sample(key) for key in keys]
    visuals = None
    if row.visual:
        scenes = dict.fromkeys(sample.scene_key for sample in samples)
        visuals = {scene: store.visual(scene) for scene in scenes}
    embedding = None if head is None else head.embed_tokens
    return collate(samples, row, embedding=embedding, visuals=visuals)
