"""Extraction: what it pairs, and that interruptions leave no trace."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.hidden.test_store import CONFIG, run
from xsd.errors import XsdError
from xsd.hidden import answer as answer_module
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import clips_together, extract, header
from xsd.hidden.media import read_media
from xsd.hidden.plan import plan_batches
from xsd.hidden.store import HiddenStore
from xsd.hidden.visual import pool_visual
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.generate import Answer, generate, prefill, teacher_force
from xsd.types import Scene


@pytest.mark.parametrize("conditioning", ["teacher_forced", "free_running"])
def test_states_are_those_of_both_models(
    pair: ModelPair, scenes: list[Scene], conditioning: str
) -> None:
    config = replace(CONFIG, conditioning=conditioning)
    [batch] = plan_batches(scenes[:2], "train", config, 2)
    [extracted] = extract(pair, [batch], config)
    assert not extracted.failures
    for asked, sample in zip(batch.samples, extracted.samples, strict=True):
        media = read_media(asked.scene, pair.num_event_images, pair.num_frames)
        whole = [
            decoder.prompt_embeddings(media, asked.question)[0]
            for decoder in (pair.drafter, pair.verifier)
        ]
        [answer] = generate(pair.verifier, whole[1:], config.max_new_tokens)
        assert torch.equal(sample.verifier_ids, answer.ids)
        torch.testing.assert_close(sample.verifier_hidden, answer.hidden, rtol=1e-4, atol=1e-4)
        if conditioning == "teacher_forced":
            [states] = teacher_force(pair.drafter, whole[:1], [answer.ids])
            assert torch.equal(sample.drafter_ids, answer.ids)
        else:
            [own] = generate(pair.drafter, whole[:1], config.max_new_tokens)
            states = own.hidden
            assert torch.equal(sample.drafter_ids, own.ids)
        torch.testing.assert_close(sample.drafter_hidden, states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["teacher_forced", "free_running"])
def test_the_verifiers_side_may_come_from_the_other_conditioning(
    pair: ModelPair, scenes: list[Scene], conditioning: str, tmp_path: Path
) -> None:
    other = {"teacher_forced": "free_running", "free_running": "teacher_forced"}[conditioning]
    config = replace(CONFIG, conditioning=conditioning)
    said = HiddenStore.open(
        run(pair, scenes, tmp_path / "other", replace(CONFIG, conditioning=other))
    )
    alone = HiddenStore.open(run(pair, scenes, tmp_path / "alone", config))
    batches = plan_batches(scenes, "train", config, 2)
    top = header(pair, batches, "train", config, "data")
    with HiddenWriter.open(tmp_path / "lent", top, batches) as writer:
        for number, extracted in enumerate(extract(pair, batches, config, said)):
            writer.add(number, extracted)
    assert HiddenStore.open(tmp_path / "lent").digest == alone.digest


def test_visual_states_are_a_clips_own(pair: ModelPair, scenes: list[Scene]) -> None:
    [extracted] = extract(pair, plan_batches(scenes[:2], "train", CONFIG, 2), CONFIG)
    for scene, visual in zip(scenes, extracted.visuals, strict=False):
        assert visual.scene_key == scene.key
        media = read_media(scene, pair.num_event_images, pair.num_frames)
        tokens = pair.verifier.visual_tokens(pair.verifier.pixels(media))
        prompt = pair.verifier.prompt("Why?")
        _, states = prefill(pair.verifier, [pair.verifier.embed_prompt(prompt, tokens)[0]], 0)
        start = len(prompt.before)
        expected = pool_visual(states[0, start : start + len(tokens)])
        torch.testing.assert_close(visual.projected, pool_visual(tokens))
        torch.testing.assert_close(visual.prefilled, expected, rtol=1e-4, atol=1e-4)


def test_plan_is_whole_clips(scenes: list[Scene]) -> None:
    config = ExtractConfig(max_questions=3, chunk_size=8, max_samples=5)
    batches = plan_batches(scenes, "train", config, 1)
    # Two clips of three questions fit into 8; five clips are spread over train and val.
    assert [(b.chunk, b.part, b.is_last, len(b.samples)) for b in batches] == [
        (0, 0, False, 3),
        (0, 1, True, 3),
        (1, 0, False, 3),
        (1, 1, True, 3),
        (2, 0, True, 3),
    ]
    assert [b.scenes[0].split for b in batches] == ["train"] * 4 + ["val"]
    with pytest.raises(XsdError, match="no test scenes to extract"):
        plan_batches([s for s in scenes if s.split != "test"], "test", config, 1)


def test_batch_size_follows_the_cache(pair: ModelPair) -> None:
    assert clips_together(pair, ExtractConfig()) == 16
    assert clips_together(pair, ExtractConfig(batch_clips=3)) == 3


def test_another_configuration_is_refused(
    pair: ModelPair, scenes: list[Scene], tmp_path: Path
) -> None:
    run(pair, scenes, tmp_path / "x")
    longer = replace(CONFIG, max_new_tokens=9)
    with pytest.raises(XsdError, match="another config; give another --output_dir"):
        run(pair, scenes, tmp_path / "x", longer)
    with pytest.raises(XsdError, match="another conditioning: 'teacher_forced', not 'free_run"):
        run(pair, scenes, tmp_path / "x", replace(CONFIG, conditioning="free_running"))
    with pytest.raises(XsdError, match="another plan"):
        run(pair, scenes[:-3], tmp_path / "x")


def test_one_writer_at_a_time(pair: ModelPair, scenes: list[Scene], tmp_path: Path) -> None:
    batches = plan_batches(scenes, "train", CONFIG, 2)
    top = header(pair, batches, "train", CONFIG, "data")
    with (
        HiddenWriter.open(tmp_path, top, batches),
        pytest.raises(XsdError, match="another process is writing it"),
        HiddenWriter.open(tmp_path, top, batches),
    ):
        pass


def test_failures_are_counted_with_their_reason(
    pair: ModelPair, dataset: Path, tmp_path: Path
) -> None:
    from xsd.scenes.dsec import load_index

    copy = Path(shutil.copytree(dataset, tmp_path / "scenes"))
    (copy / "mp4/train_0000/000001.mp4").write_bytes(b"not a video")
    config = replace(CONFIG, chunk_size=3, batch_clips=1)
    folder = run(pair, load_index(copy), tmp_path / "x", config)
    store = HiddenStore.open(folder)
    assert [f.key for f in store.failures] == [f"train_0000/000001/q{q}" for q in range(3)]
    assert "cannot be decoded" in store.failures[0].reason
    assert len(store) == 15 and not any("train_0000/000001" in s.key for s in store)
    # Its chunk would be empty; the others keep their names.
    assert sorted(path.name for path in (folder / "chunks").iterdir())[:2] == [
        "chunk_000000.safetensors",
        "chunk_000006.safetensors",
    ]


@pytest.mark.parametrize("room", [6, 3, 1])
def test_what_does_not_fit_into_memory_is_halved_and_counted(
    pair: ModelPair, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Batches of two clips with three questions; memory has room for so many answers."""
    batches = plan_batches(scenes[:4], "train", CONFIG, 2)
    assert len(batches) == 2
    expected = list(extract(pair, batches, CONFIG))

    def small(decoder: Decoder, prompts: list[torch.Tensor], num_new: int) -> list[Answer]:
        if len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(decoder, prompts, num_new)

    monkeypatch.setattr(answer_module, "generate", small)
    found = list(extract(pair, batches, CONFIG))
    # 6 into 3 and 3, those into 1 and 2, those into 1 and 1; the next batch is tried whole again.
    assert [x.num_halvings for x in found] == [{6: 0, 3: 1, 1: 5}[room]] * 2
    for one, other in zip(found, expected, strict=True):
        assert one.batch == other.batch and not one.failures
        assert [x.key for x in one.samples] == [x.key for x in other.samples]
        assert [x.scene_key for x in one.visuals] == [x.scene_key for x in other.visuals]
        for a, b in zip(one.samples, other.samples, strict=True):
            assert torch.equal(a.verifier_ids, b.verifier_ids)
            torch.testing.assert_close(a.drafter_hidden, b.drafter_hidden, rtol=1e-4, atol=1e-4)


def test_an_answer_that_does_not_fit_alone(
    pair: ModelPair, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> list[Answer]:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried 9 GB")

    monkeypatch.setattr(answer_module, "generate", none)
    with pytest.raises(XsdError, match="train_0000/000000/q0: memory does not suffice for one"):
        next(extract(pair, plan_batches(scenes, "train", CONFIG, 2), CONFIG))


def test_other_errors_are_not_taken_for_want_of_memory(
    pair: ModelPair, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[Answer]:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(answer_module, "generate", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        next(extract(pair, plan_batches(scenes, "train", CONFIG, 2), CONFIG))


def test_the_time_of_each_part_is_told(pair: ModelPair, scenes: list[Scene]) -> None:
    [extracted] = extract(pair, plan_batches(scenes[:2], "train", CONFIG, 2), CONFIG)
    assert {"reading", "waiting", "verifier decode", "drafter forced pass"} <= set(
        extracted.seconds
    )
    assert all(seconds >= 0 for seconds in extracted.seconds.values())


def test_states_that_are_not_finite_are_a_failure(
    pair: ModelPair, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> list[torch.Tensor]:
        states = teacher_force(*args)  # type: ignore[arg-type]
        states[4][0, 0] = float("nan")
        return states

    monkeypatch.setattr(answer_module, "teacher_force", broken)
    [extracted] = extract(pair, plan_batches(scenes[:2], "train", CONFIG, 2), CONFIG)
    assert len(extracted.samples) == 5
    assert [(f.key[-2:], f.reason) for f in extracted.failures] == [
        ("q1", "the drafter's states are not finite")
    ]


def test_event_images_are_rendered_where_they_are_missing(
    scenes: list[Scene], tmp_path: Path
) -> None:
    prepared = read_media(scenes[0], 5, 8)
    rendered = read_media(replace(scenes[0], event_images=()), 5, 8)
    for one, other in zip(prepared.event_images, rendered.event_images, strict=True):
        assert (one == other).all()
    with pytest.raises(XsdError, match="neither 5 event images nor an event file"):
        read_media(replace(scenes[0], event_images=(), events=None), 5, 8)
