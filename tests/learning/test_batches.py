"""Batches of streams from stored answers."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.hidden.test_store import seed_folder
from xsd.adapters.base import Streams
from xsd.adapters.catalog import LEVELS, level
from xsd.errors import XsdError
from xsd.hidden.index import Header
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.plan import Batch, Extracted
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.learning import batches
from xsd.learning.batches import OrderedBatches, TrainBatches, check_level, held_out_keys
from xsd.types import ClipVisual, HiddenSample, Sample, Scene

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
    assert torch.equal(streams.verifier[:, 0, 0].long() % VOCAB, streams.ids[:, 0])
    return streams.verifier[:, 0, 0].int().tolist()


@pytest.mark.parametrize("resident_bytes", [1 << 30, 1, 3000])
def test_an_epoch_is_every_training_answer_once(store: HiddenStore, resident_bytes: int) -> None:
    batches = TrainBatches(store, level("L1"), batch_size=4, seed=3, resident_bytes=resident_bytes)
    epochs = [[numbers(streams) for streams in batches(epoch)] for epoch in (0, 1, 0)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4] * 6 + [3]
        assert sorted(chain.from_iterable(epoch)) == list(range(27))
    assert epochs[0] == epochs[2] != epochs[1]
    other = TrainBatches(store, level("L1"), batch_size=4, seed=4, resident_bytes=resident_bytes)
    assert [numbers(streams) for streams in other(0)] != epochs[0]


def test_batches_are_of_answers_of_like_length(
    store: HiddenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_positions() -> int:
        made = TrainBatches(store, level("L1"), batch_size=3, seed=0)
        return sum(streams.mask.numel() for streams in made(0))

    sorted_in_pools = num_positions()
    monkeypatch.setattr(batches, "ALIKE", 1)
    assert sorted_in_pools < num_positions()


def test_small_data_is_shuffled_as_a_whole_and_large_data_by_chunks(store: HiddenStore) -> None:
    def chunks_of_first_six(resident_bytes: int) -> set[int]:
        batches = TrainBatches(
            store, level("L1"), batch_size=6, seed=0, resident_bytes=resident_bytes
        )
        return {number // PER_CHUNK for number in numbers(next(batches(0)))}

    assert len(chunks_of_first_six(1 << 30)) > 2
    assert len(chunks_of_first_six(1)) <= 2


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_gets_what_it_reads(store: HiddenStore, name: str) -> None:
    row = level(name)
    [streams] = OrderedBatches(store, row, store.keys("val"), batch_size=8, head=HEAD)
    streams.require(row)
    assert numbers(streams) == [27, 28, 29]
    assert streams.mask.sum(1).tolist() == [4, 1, 2]
    assert streams.verifier.dtype == torch.float32
    if "token" in row.streams:
        assert streams.token is not None
        assert torch.equal(streams.token[0], HEAD.embed_tokens[torch.full((4,), 27)])
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
    for row, key in enumerate(store.keys("val")):
        states = store.sample(key).verifier_hidden
        assert torch.equal(streams.ids[row, : len(states)], (states @ head.lm_head.T).argmax(-1))
    assert sum(len(x.ids) for x in TrainBatches(store, level("B1"), batch_size=8, seed=0)(0)) == 20


def test_held_out_keys(store: HiddenStore, tmp_path: Path) -> None:
    assert held_out_keys(store) == store.keys("val")
    seed = HiddenStore.open(seed_folder(tmp_path / "a"))
    assert held_out_keys(seed) == seed.keys()
    test = HiddenStore.open(seed_folder(tmp_path / "b", split="test"))
    assert held_out_keys(test) == test.keys("test") == test.keys()
