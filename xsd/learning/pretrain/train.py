"""The whole of it, for each model: facts, gathering, first words in few layers, then all layers."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from xsd.errors import XsdError
from xsd.files import atomic_path, sha256_json
from xsd.learning.pretrain.config import PretrainConfig
from xsd.learning.pretrain.corpus import SLOTS, Corpus, label_facts
from xsd.learning.pretrain.language import (
    Lessons,
    Readout,
    shallow,
    start_loaders,
    teach_gathering,
    teach_language,
)
from xsd.learning.pretrain.state import Progress
from xsd.learning.pretrain.vision import PretrainReport, Visual, teach_facts, visual_table
from xsd.pairs import eventgpt, tiny, video_llava
from xsd.pairs.base import Decoder
from xsd.pairs.device import choose_device
from xsd.pairs.eventgpt import EventGPT, EventGPTDecoder
from xsd.pairs.video_llava import VideoLlava, VideoLlavaDecoder
from xsd.scenes.language import House, answer
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.synthetic import sample_facts


@dataclass(frozen=True)
class TinyModels:
    """The two models in training, and the tokenizer they share."""

    drafter: EventGPT
    verifier: VideoLlava
    tokenizer: Any

    @classmethod
    def new(cls, config: PretrainConfig) -> TinyModels:
        torch.manual_seed(config.seed)
        drafter = EventGPT(tiny.drafter_config(config.size))
        verifier = VideoLlava(tiny.verifier_config(config.size))
        return cls(drafter, verifier, tiny.train_tokenizer(_texts(config)))

    def save(self, folder: Path) -> None:
        """Half precision on disk: the rounding is far below what training leaves open."""
        processing = tiny.processing()
        drafter, verifier = (
            copy.deepcopy(model).cpu().half() for model in (self.drafter, self.verifier)
        )
        eventgpt.save(drafter, processing, folder / "drafter")
        video_llava.save(verifier, processing, folder / "verifier")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def _texts(config: PretrainConfig) -> Iterator[str]:
    """What the tokenizer learns from: answers of both houses, and all prompts."""
    rng = np.random.default_rng(config.seed)
    for _ in range(2000):
        facts = sample_facts(rng)
        for question in range(len(QUESTIONS)):
            for house in get_args(House):
                yield answer(facts, question, house)
    for question_text in QUESTIONS * 300:
        yield f"{eventgpt.SYSTEM} USER: <ev_start><ev_end>\n{question_text} ASSISTANT:"


@dataclass(frozen=True)
class Pupil:
    """A model in training, taken apart."""

    house: House
    model: Any
    language_model: Any
    visual: Visual
    visual_parameters: list[nn.Parameter]
    prompts: Decoder
    """Words the prompts. A decoder takes its model's weights over, so it holds a copy."""

    @classmethod
    def of(cls, house: House, models: TinyModels) -> Pupil:
        if house == "verifier":
            verifier = models.verifier
            return cls(
                house,
                verifier,
                verifier.model.language_model,
                lambda pixels: video_llava.visual_tokens(verifier, pixels),
                [
                    *verifier.model.video_tower.parameters(),
                    *verifier.model.multi_modal_projector.parameters(),
                ],
                VideoLlavaDecoder(copy.deepcopy(verifier), models.tokenizer, tiny.processing()),
            )
        drafter = models.drafter
        return cls(
            house,
            drafter,
            drafter.model,
            drafter.visual_tokens,
            [
                *drafter.model.visual_tower.parameters(),
                *drafter.model.visual_projector.parameters(),
                *drafter.model.feature_adaptor.parameters(),
            ],
            EventGPTDecoder(copy.deepcopy(drafter), models.tokenizer, tiny.processing()),
        )


def pretrain(
    config: PretrainConfig, corpus: Corpus, models: TinyModels, states: Path | None = None
) -> Iterator[PretrainReport]:
    """Train both models in place; neither depends on the other, so a GPU trains them at once.

    Args:
        states: folder in which each model's state is kept; where there is one of the same
            configuration, training goes on from it, phases that are finished left out.

    Raises:
        XsdError: a state is unreadable, or another configuration's.
    """
    if choose_device(config.device).type == "cuda":
        yield from _side_by_side(config, corpus, models, states)
        return
    yield from pretrain_one("verifier", config, corpus, models, states)
    yield from pretrain_one("drafter", config, corpus, models, states)


def _side_by_side(
    config: PretrainConfig, corpus: Corpus, models: TinyModels, states: Path | None
) -> Iterator[PretrainReport]:
    """The drafter in a process of its own, on a second GPU where there is one."""
    context = mp.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    beside = replace(config, device="cuda:1" if torch.cuda.device_count() > 1 else "cuda")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "drafter.safetensors"
        seen = Corpus(corpus.facts, corpus.frames[:0], corpus.events)
        process = context.Process(target=_train_drafter, args=(beside, seen, path, theirs, states))
        process.start()
        theirs.close()
        try:
            for report in pretrain_one("verifier", config, corpus, models, states):
                yield report
                yield from _arrived(mine)
            process.join()
            yield from _arrived(mine)
        finally:
            process.terminate()
        if not path.is_file():
            raise XsdError("the drafter's training ended early; see its output above")
        load_model(models.drafter, path)


def _arrived(reports: Connection) -> Iterator[PretrainReport]:
    """What the other process has reported by now; nothing more once it has ended."""
    try:
        while reports.poll():
            yield reports.recv()
    except EOFError:
        return


def _train_drafter(
    config: PretrainConfig, corpus: Corpus, path: Path, reports: Connection, states: Path | None
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    models = TinyModels.new(config)
    for report in pretrain_one("drafter", config, corpus, models, states):
        reports.send(report)
    with atomic_path(path) as temporary:
        save_model(models.drafter.cpu(), str(temporary))


def _end_with_parent() -> None:
    """Left alone by a command that was killed, it would write the state of the next one's."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def pretrain_one(
    house: House,
    config: PretrainConfig,
    corpus: Corpus,
    models: TinyModels,
    states: Path | None = None,
) -> Iterator[PretrainReport]:
    """Train one of the two models in place; see ``pretrain``."""
    torch.manual_seed(config.seed)
    if config.num_workers:
        start_loaders()
    device = choose_device(config.device)
    pupil = Pupil.of(house, models)
    pupil.model.to(device)
    path = None if states is None else states / f"{house}.safetensors"
    progress = Progress(path, _key(config), pupil.model)
    images = torch.from_numpy(corpus.frames if house == "verifier" else corpus.events).to(device)
    slots = SLOTS[house]
    labels = label_facts(corpus.facts, slots).to(device)
    if not progress.is_past("facts"):
        yield from teach_facts(
            pupil.visual, pupil.visual_parameters, images, labels, slots, config, house, progress
        )
    tokens = visual_table(pupil.visual, images)
    depth = getattr(tiny.SIZES[config.size], house).first_layers
    # The same whether or not the facts were taught by this process.
    torch.manual_seed(config.seed)
    readout = Readout(pupil.language_model, tokens.shape[2], slots, depth).to(device)
    if not progress.is_past("language"):
        with shallow(pupil.language_model, readout.depth):
            if not progress.is_past("gathering"):
                yield from teach_gathering(
                    pupil.prompts, pupil.language_model, readout, tokens, labels, house, config,
                    progress,
                )  # fmt: skip
            steps = config.language_steps if house == "verifier" else config.drafter_steps
            yield from _teach(
                pupil, tokens, labels, readout, corpus, config, steps, progress, "language"
            )
    if readout.depth < len(pupil.language_model.layers):
        grown = replace(
            config,
            seed=config.seed + 1,
            learning_rate=config.learning_rate * config.grown_rate,
            muon_learning_rate=config.muon_learning_rate * config.grown_rate,
        )
        yield from _teach(
            pupil, tokens, labels, readout, corpus, grown, config.grown_steps, progress, "grown"
        )
    readout.remove()


def _key(config: PretrainConfig) -> str:
    """Of all that decides what is learned, and not where."""
    names = {field.name for field in fields(PretrainConfig)} - {"device", "num_workers"}
    return sha256_json({name: getattr(config, name) for name in sorted(names)})


def _teach(
    pupil: Pupil,
    tokens: Tensor,
    labels: Tensor,
    readout: Readout,
    corpus: Corpus,
    config: PretrainConfig,
    num_steps: int,
    progress: Progress,
    phase: str,
) -> Iterator[PretrainReport]:
    prompts = [pupil.prompts.prompt(question) for question in QUESTIONS]
    (eos,) = pupil.prompts.eos_ids
    lessons = Lessons(
        pupil.prompts.tokenizer,
        [(prompt.before, prompt.after) for prompt in prompts],
        eos,
        tokens.shape[1],
        corpus.facts,
        pupil.house,
        batch_scenes=config.batch_scenes
        if pupil.house == "verifier"
        else config.drafter_batch_scenes,
        questions_per_scene=config.questions_per_scene,
        num_steps=num_steps,
        seed=config.seed,
    )
    return teach_language(
        lessons, pupil.model, pupil.language_model, tokens, readout, labels, config, progress, phase
    )
