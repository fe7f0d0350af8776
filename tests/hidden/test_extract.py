"""Extraction: what it pairs, and that interruptions leave no trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.hidden.test_store import CONFIG, run
from xsd.errors import XsdError
from xsd.hidden import writer as writer_module
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import clips_together, extract, header
from xsd.hidden.media import read_media
from xsd.hidden.plan import plan_batches
from xsd.hidden.store import HiddenStore
from xsd.hidden.visual import pool_visual
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import ModelPair
from xsd.pairs.generate import generate, prefill, teacher_force
from xsd.types import Scene


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


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
        for extracted in extract(pair, batches, config, said):
            writer.add(extracted)
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


class Killed(BaseException):
    pass


def dying_write(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Let the n-th call of a function of the writer's module end the process, before or after."""
    original: Callable[..., object] = getattr(writer_module, name)
    calls = []

    def dying(*args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == after:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(writer_module, name, dying)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("save_file", 1),  # a part
        ("save_file", 2),
        ("write_chunk", 1),
        ("save_file", 3),  # visual states, after the chunk
        ("_size_and_digest", 4),
        ("save_file", 7),
    ],
)
def test_a_kill_at_any_moment_leaves_no_trace(
    pair: ModelPair, scenes: list[Scene], tmp_path: Path, name: str, after: int
) -> None:
    config = replace(CONFIG, batch_clips=1)
    expected = files(run(pair, scenes, tmp_path / "whole", config))
    with pytest.MonkeyPatch.context() as patch:
        dying_write(patch, name, after)
        with pytest.raises(Killed):
            run(pair, scenes, tmp_path / "killed", config)
    # What a process that had no time to clean up leaves.
    (tmp_path / "killed/chunks").mkdir(exist_ok=True)
    (tmp_path / "killed/chunks/.chunk_000000.safetensors.1.tmp.safetensors").write_bytes(b"half")
    with pytest.raises(XsdError, match="was interrupted"):
        HiddenStore.open(tmp_path / "killed")
    assert files(run(pair, scenes, tmp_path / "killed", config)) == expected


def test_only_what_is_missing_is_answered_again(
    pair: ModelPair, scenes: list[Scene], tmp_path: Path
) -> None:
    config = replace(CONFIG, batch_clips=1)
    batches = plan_batches(scenes, "train", config, 1)
    top = header(pair, batches, "train", config, "data")
    for already in (0, 1, 2, 3, 5, 6):
        with HiddenWriter.open(tmp_path, top, batches) as writer:
            assert writer.num_stored == already
            step = {3: 2}.get(already, 1)
            for extracted in extract(pair, batches[already : already + step], config):
                writer.add(extracted)
    with HiddenWriter.open(tmp_path, top, batches) as writer:
        assert writer.num_stored == len(batches) == 6 and writer.index.complete
    assert not (tmp_path / ".parts").exists()


def test_a_damaged_part_is_made_again(pair: ModelPair, scenes: list[Scene], tmp_path: Path) -> None:
    config = replace(CONFIG, batch_clips=1)
    batches = plan_batches(scenes, "train", config, 1)
    top = header(pair, batches, "train", config, "data")
    with HiddenWriter.open(tmp_path, top, batches) as writer:
        writer.add(next(extract(pair, batches, config)))
    [part] = (tmp_path / ".parts").iterdir()
    part.write_bytes(part.read_bytes()[:20])
    with HiddenWriter.open(tmp_path, top, batches) as writer:
        assert writer.num_stored == 0


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


def test_states_that_are_not_finite_are_a_failure(
    pair: ModelPair, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xsd.hidden import extract as module

    def broken(*args: object) -> list[torch.Tensor]:
        states = teacher_force(*args)  # type: ignore[arg-type]
        states[4][0, 0] = float("nan")
        return states

    monkeypatch.setattr(module, "teacher_force", broken)
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
