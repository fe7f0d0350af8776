"""Batches of streams from stored answers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hidden.test_store import seed_folder
from xsd.adapters.base import Streams
from xsd.adapters.catalog import LEVELS, level
from xsd.adapters.collate import Answers
from xsd.errors import XsdError
from xsd.hidden.index import Header
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.plan import Batch, Extracted
from xsd.hidden.sample import ClipVisual, HiddenSample
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.learning import batches
from xsd.learning.batches import (
    OrderedBatches,
    TrainBatch,
    TrainBatches,
    check_level,
    held_out_keys,
)
from xsd.types import Sample, Scene

VOCAB, D_DRAFTER, D_VERIFIER = 30, 3, 4
HEAD = VerifierHead(torch.randn(VOCAB, D_VERIFIER), torch.randn(VOCAB, D_VERIFIER), "", "")
NUM_CHUNKS, PER_CHUNK = 5, 6


def answer(key: str, number: int) -> HiddenSample:
    length = 1 + number % 4
    ids = torch.full((length,), number % VOCAB)
    states = torch.full((length, D_DRAFTER), float(number))
    return HiddenSample(key, states, torch.full((length, D_VERIFIER), float(number)), ids, ids)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> HiddenStore:
    """30 answers in 5 chunks of two clips; the last clip is val."""
    folder = tmp_path_factory.mktemp("store")
    plan, extracted, number = [], [], 0
    for chunk in range(NUM_CHUNKS):
        clips = [2 * chunk, 2 * chunk + 1]
        scenes = [
            Scene("r", clip, "val" if clip == 9 else "train", None, (), None, Path("x"))
            for clip in clips
        ]
        asked = tuple(Sample(scene, q, "?") for scene in scenes for q in range(PER_CHUNK // 2))
        plan.append(Batch(chunk, 0, True, asked))
        answers = tuple(answer(s.key, number + i) for i, s in enumerate(asked))
        number += len(asked)
        visuals = tuple(
            ClipVisual(
                scene.key,
                torch.full((2, D_VERIFIER), float(scene.clip)),
                torch.full((2, D_VERIFIER), -float(scene.clip)),
            )
            for scene in scenes
        )
        extracted.append(Extracted(plan[-1], answers, visuals, ()))
    header = Header(
        *("tiny", {}, "teacher_forced", "fp32", "safetensors", D_DRAFTER, D_VERIFIER), 6, {}, ""
    )
    with HiddenWriter.open(folder, header, plan) as writer:
        for number, part in enumerate(extracted):
            writer.add(number, part)
    return HiddenStore.open(folder)


def numbers(streams: Streams) -> list[int]:
    """The answers in a batch, by the number that fills them."""
    _, layout = streams.packed()
    first = layout.positions == 0
    found = streams.verifier[0, first, 0]
    assert torch.equal(found.long() % VOCAB, streams.ids[0, first])
    return [int(number) for number in found]


def trained_on(batches: Iterable[TrainBatch]) -> list[list[int]]:
    return [numbers(batch.streams) for batch in batches]


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("window_bytes", [1 << 30, 1, 3000])
def test_an_epoch_is_every_training_answer_once(
    store: HiddenStore, window_bytes: int, room: int | None
) -> None:
    def made(seed: int, room: int | None = room) -> TrainBatches:
        return TrainBatches(
            store, level("L1"), batch_size=4, seed=seed, window_bytes=window_bytes, room=room
        )

    batches = made(3)
    assert batches.is_resident == (room is None)
    epochs = [trained_on(batches(epoch)) for epoch in (0, 1, 0)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4] * 6 + [3]
        assert sorted(chain.from_iterable(epoch)) == list(range(27))
    assert epochs[0] == epochs[2] != epochs[1]
    assert trained_on(made(4)(0)) != epochs[0]
    # Where answers wait is no matter of what is trained on; nor is where an epoch was left.
    assert trained_on(made(3, 0 if room is None else None)(0)) == epochs[0]
    for skip in range(8):
        assert trained_on(batches(0, skip)) == epochs[0][skip:]


def test_processes_share_every_batch(store: HiddenStore) -> None:
    def made(share: tuple[int, int]) -> TrainBatches:
        return TrainBatches(store, level("L1"), batch_size=4, seed=3, share=share)

    whole = list(made((0, 1))(0))
    shares = [list(made((rank, 4))(0)) for rank in range(4)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {part.lengths for part in parts} == {batch.lengths}
        counted = [part for part in parts if not part.is_idle]
        found = sorted(chain.from_iterable(trained_on(counted)))
        assert found == sorted(numbers(batch.streams))
    # The epoch ends on three answers, and one process has none.
    assert [share[-1].is_idle for share in shares] == [False, False, False, True]


def test_ordered_batches_are_shared_whole(store: HiddenStore) -> None:
    def made(share: tuple[int, int]) -> list[list[int]]:
        batches = OrderedBatches(store, level("L1"), store.keys(), batch_size=4, share=share)
        return [numbers(streams) for streams in batches]

    whole, first, second = made((0, 1)), made((0, 2)), made((1, 2))
    assert whole[::2] == first and whole[1::2] == second


def test_an_epoch_may_be_left_early(store: HiddenStore) -> None:
    batches = TrainBatches(store, level("L1"), batch_size=4, seed=3, window_bytes=1, room=0)
    epoch = batches(0)
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert len(list(batches(0))) == 7


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_their_number_is_known_beforehand(store: HiddenStore, size: int) -> None:
    made = TrainBatches(store, level("L1"), batch_size=size, seed=0)
    assert len(made) == len(list(made(0))) == len(list(made(1)))


def test_batches_are_of_answers_of_like_length(
    store: HiddenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_positions() -> int:
        made = TrainBatches(store, level("L1"), batch_size=3, seed=0)
        return sum(len(batch.lengths) * max(batch.lengths) for batch in made(0))

    sorted_in_pools = num_positions()
    monkeypatch.setattr(batches, "ALIKE", 1)
    assert sorted_in_pools < num_positions()


def test_small_data_is_shuffled_as_a_whole_and_large_data_by_chunks(store: HiddenStore) -> None:
    def chunks_of_first_six(window_bytes: int) -> set[int]:
        batches = TrainBatches(store, level("L1"), batch_size=6, seed=0, window_bytes=window_bytes)
        return {number // PER_CHUNK for number in numbers(next(batches(0)).streams)}

    assert len(chunks_of_first_six(1 << 30)) > 2
    assert len(chunks_of_first_six(1)) <= 2


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_gets_what_it_reads(store: HiddenStore, name: str) -> None:
    row = level(name)
    [streams] = OrderedBatches(store, row, store.keys("val"), batch_size=8, head=HEAD)
    streams.require(row)
    assert numbers(streams) == [27, 28, 29]
    assert streams.packed()[1].lengths == (4, 1, 2)
    assert streams.verifier.dtype == torch.float32
    if "token" in row.streams:
        assert streams.token is not None
        assert torch.equal(streams.token[0, :4], HEAD.embed_tokens[torch.full((4,), 27)])
    if row.visual:
        assert streams.visual is not None
        assert streams.visual[0, 0, 0] == (9 if row.visual == "projected" else -9)


def test_ordered_batches_repeat(store: HiddenStore) -> None:
    batches = OrderedBatches(store, level("L4"), store.keys(), batch_size=7)
    assert len(batches) == 5 == len(batches.batches)
    for _ in range(2):
        assert list(chain.from_iterable(map(numbers, batches))) == list(range(30))


def test_what_is_missing_is_refused_by_name(store: HiddenStore, tmp_path: Path) -> None:
    seed = HiddenStore.open(seed_folder(tmp_path / "seed"))
    for name, lacks in (
        ("X1", "reads projected visual states"),
        ("E1", "reads token ids"),
        ("E2", "reads token ids"),
        ("text", "reads token ids"),
        ("E3", "reads token ids and prefilled visual states"),
    ):
        with pytest.raises(XsdError, match=f"level {name} {lacks}, which chunks of the published"):
            TrainBatches(seed, level(name), batch_size=4, seed=0, head=HEAD)
    for name in ("L1", "L2", "L3", "L4", "L5", "B1", "L5F"):
        check_level(seed, level(name))
        check_level(store, level(name))
    with pytest.raises(XsdError, match="no answers to score"):
        OrderedBatches(store, level("L1"), store.keys("test"), batch_size=4)


def test_an_empty_train_split(tmp_path: Path) -> None:
    store = HiddenStore.open(seed_folder(tmp_path / "seed", split="test"))
    with pytest.raises(XsdError, match="its train split is empty"):
        TrainBatches(store, level("L1"), batch_size=4, seed=0)


def test_published_chunks_get_the_ids_that_the_head_reads(tmp_path: Path) -> None:
    store = HiddenStore.open(seed_folder(tmp_path / "seed"))
    head = VerifierHead(torch.randn(VOCAB, 3), torch.randn(VOCAB, 3), "", "")
    [streams] = OrderedBatches(store, level("L1"), store.keys("val"), batch_size=99, head=head)
    states = torch.cat([store.sample(key).verifier_hidden for key in store.keys("val")])
    assert torch.equal(streams.ids[0], (states @ head.lm_head.T).argmax(-1))
    made = TrainBatches(store, level("B1"), batch_size=8, seed=0)(0)
    assert sum(len(batch.lengths) for batch in made) == 20


def test_held_out_keys(store: HiddenStore, tmp_path: Path) -> None:
    assert held_out_keys(store) == store.keys("val")
    seed = HiddenStore.open(seed_folder(tmp_path / "a"))
    assert held_out_keys(seed) == seed.keys()
    test = HiddenStore.open(seed_folder(tmp_path / "b", split="test"))
    assert held_out_keys(test) == test.keys("test") == test.keys()


class Living:
    """Answers that were read, and how many of them are still held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = self.most = self.read = 0
        self._lock = threading.Lock()
        read = batches._answers

        def counted(*args: Any) -> Answers:
            answers = read(*args)
            self._count(len(answers))
            weakref.finalize(answers, self._count, -len(answers))
            return answers

        monkeypatch.setattr(batches, "_answers", counted)

    def _count(self, num: int) -> None:
        with self._lock:
            self._now += num
            self.most = max(self.most, self._now)
            self.read += max(num, 0)


def test_streaming_holds_few_windows(store: HiddenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the batch in hand and the next; for a moment between two, a third."""
    window_bytes = store.num_bytes // NUM_CHUNKS
    living = Living(monkeypatch)
    made = TrainBatches(store, level("L1"), batch_size=2, seed=0, window_bytes=window_bytes, room=0)
    for epoch in range(3):
        assert len(trained_on(made(epoch))) == len(made)
    assert living.read == 3 * 27
    window = PER_CHUNK + 1  # one answer may be left over from the window before
    assert PER_CHUNK // 2 <= living.most <= 3 * window < 27


def test_scoring_reads_no_further_than_a_few_batches_ahead(
    store: HiddenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = Living(monkeypatch)
    assert len([*OrderedBatches(store, level("L1"), store.keys(), batch_size=3)]) == 10
    assert living.read == 30 and living.most <= 3 * (batches._AHEAD + 2)
