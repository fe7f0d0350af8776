"""Makes the tiny pair: two small multimodal models trained from scratch on synthetic scenes.

First an attribute head teaches the visual tokens what is in the scene, and is dropped; then, with
the vision frozen and its tokens computed once, each language model learns its house's answers.
Several questions of a clip share its visual prefix in one row, kept apart by the attention mask.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from xsd.learning.pretrain_config import PretrainConfig
from xsd.pairs import eventgpt, tiny, video_llava
from xsd.pairs.base import Decoder
from xsd.pairs.eventgpt import EventGPT, EventGPTDecoder
from xsd.pairs.segments import attend_in_segments
from xsd.pairs.video_llava import VideoLlava, VideoLlavaDecoder
from xsd.scenes import facts as f
from xsd.scenes.facts import Facts
from xsd.scenes.language import House, answer
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.synthetic import sample_facts, scene_tensors

Visual = Callable[[Float[Tensor, "B N 3 H W"]], Float[Tensor, "B visual D"]]


@dataclass(frozen=True)
class Corpus:
    """Clips as both models see them: facts, and images after resize and crop."""

    facts: list[Facts]
    frames: UInt8[np.ndarray, "clips N H W 3"]
    events: UInt8[np.ndarray, "clips M H W 3"]


@dataclass(frozen=True)
class PretrainReport:
    """What pretraining yields as it goes."""

    phase: str
    step: int
    loss: float
    metrics: dict[str, float]


def make_corpus(config: PretrainConfig, num_clips: int, first_recording: int) -> Corpus:
    """Render clips of whole recordings; equal for any number of processes."""
    jobs = [
        (config, first_recording + index // config.clips_per_recording, index)
        for index in range(num_clips)
    ]
    with ProcessPoolExecutor(config.num_workers, mp_context=get_context("spawn")) as pool:
        clips = list(pool.map(_make_clip, jobs, chunksize=16))
    facts, frames, events = zip(*clips, strict=True)
    return Corpus(list(facts), np.stack(frames), np.stack(events))


def clip_facts(config: PretrainConfig, num_clips: int, first_recording: int) -> Iterator[Facts]:
    """The facts of ``make_corpus``, without the pictures."""
    for index in range(num_clips):
        recording = first_recording + index // config.clips_per_recording
        yield _draw(config, recording, index)[0]


def _draw(config: PretrainConfig, recording: int, index: int) -> tuple[Facts, int]:
    """Facts of a clip and the seed of its picture."""
    of_recording = sample_facts(np.random.default_rng((config.seed, recording)))
    rng = np.random.default_rng((config.seed, recording, index))
    return sample_facts(rng, of_recording), int(rng.integers(2**31))


def _make_clip(
    job: tuple[PretrainConfig, int, int],
) -> tuple[Facts, UInt8[np.ndarray, "N H W 3"], UInt8[np.ndarray, "M H W 3"]]:
    facts, seed = _draw(*job)
    frames, events = scene_tensors(facts, seed, job[0].size, tiny.NUM_EVENT_IMAGES)
    resize = tiny.processing().resize_and_crop
    return facts, np.stack([resize(x) for x in frames]), np.stack([resize(x) for x in events])


# ---------------------------------------------------------------- facts -> visual tokens

Slots = dict[str, int]

VERIFIER_SLOTS: Slots = {
    "time": 3, "road": 4, "roadside": 4, "light": 3, "pedestrian": 3,
    **{f"{lane}.{name}": size for lane in f.LANES
       for name, size in (("kind", 5), ("color", 7), ("motion", 4), ("distance", 3))},
}  # fmt: skip
DRAFTER_SLOTS = {
    name: size
    for name, size in VERIFIER_SLOTS.items()
    if name not in ("time", "light") and not name.endswith(".color")
}


def _label(facts: Facts, slot: str) -> int:
    if "." not in slot:
        values: tuple[str, ...] = {
            "time": f.TIMES, "road": f.ROADS, "roadside": f.ROADSIDES,
            "light": f.LIGHTS, "pedestrian": f.PEDESTRIANS,
        }[slot]  # fmt: skip
        return values.index(getattr(facts, slot))
    lane, name = slot.split(".")
    values = {"kind": f.KINDS, "color": f.COLORS, "motion": f.MOTIONS, "distance": f.DISTANCES}[
        name
    ]
    found = [vehicle for vehicle in facts.vehicles if vehicle.lane == lane]
    return 1 + values.index(getattr(found[0], name)) if found else 0


class AttributeHead(nn.Module):
    """A small encoder over the visual tokens with one query a fact. Training aid only."""

    def __init__(self, num_tokens: int, width: int, slots: Slots) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(slots), width) * 0.02)
        self.positions = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList([nn.Linear(width, size) for size in slots.values()])

    def forward(self, tokens: Float[Tensor, "B visual D"]) -> list[Float[Tensor, "B _size"]]:
        queries = self.queries.expand(len(tokens), -1, -1)
        states = self.encoder(torch.cat([queries, self.norm(tokens) + self.positions], dim=1))
        return [output(states[:, index]) for index, output in enumerate(self.outputs)]


def teach_facts(
    visual: Visual,
    parameters: list[nn.Parameter],
    images: UInt8[np.ndarray, "clips N H W 3"],
    facts: Sequence[Facts],
    slots: Slots,
    config: PretrainConfig,
    name: str,
) -> Iterator[PretrainReport]:
    """Train the visual path until a small head can read the facts off its tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    labels = torch.tensor([[_label(fact, slot) for slot in slots] for fact in facts])
    num_val = max(1, len(facts) // 20)
    with torch.no_grad():
        tokens = visual(normalise(images[:1]))
    head = AttributeHead(tokens.shape[1], tokens.shape[2], slots)
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=1e-3, weight_decay=0.01)
    batch = 32
    steps = config.facts_epochs * ((len(facts) - num_val) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    step = 0
    for _ in range(config.facts_epochs):
        order = num_val + torch.randperm(len(facts) - num_val, generator=generator)
        total = 0.0
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            outputs = head(visual(normalise(images[chosen.numpy()])))
            loss = sum(
                (functional.cross_entropy(out, labels[chosen, i]) for i, out in enumerate(outputs)),
                torch.zeros(()),
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*parameters, *head.parameters()], 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            total += loss.item()
        with torch.no_grad():
            outputs = head(visual(normalise(images[:num_val])))
        right = {
            slot: float((out.argmax(-1) == labels[:num_val, i]).float().mean())
            for i, (slot, out) in enumerate(zip(slots, outputs, strict=True))
        }
        yield PretrainReport(f"{name}.facts", step, total / (len(order) // batch), right)


# ---------------------------------------------------------------- visual tokens -> language model


class Readout(nn.Module):
    """Linear readings of the scene's facts from one layer, each at a visual position of its own.

    A deep language model is slow to find out, from answers alone, that it should gather what the
    frames show. Asked for the facts a third of the way up, it gathers them there; and as every
    fact has its own position (the last ones of the prefix), attention can look one up where a
    word calls for it. Training aid only.
    """

    def __init__(self, language_model: Any, width: int, slots: Slots) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList([nn.Linear(width, size) for size in slots.values()])
        num_layers = len(language_model.layers)
        self.depth = num_layers if num_layers < 4 else 5 * num_layers // 12
        self._state: Tensor | None = None
        language_model.layers[self.depth - 1].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self._state = output[0] if isinstance(output, tuple) else output

    def loss(self, num_prefix: int, labels: Int[Tensor, "B slots"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the facts, from the pass that has just been run."""
        assert self._state is not None
        start = num_prefix - len(self.outputs)
        states = self.norm(self._state[:, start:num_prefix])
        losses = [
            functional.cross_entropy(output(states[:, index]), labels[:, index])
            for index, output in enumerate(self.outputs)
        ]
        return torch.stack(losses).mean()


@contextmanager
def shallow(language_model: Any, depth: int) -> Iterator[None]:
    """For a while, the language model is its first ``depth`` layers.

    Deep models are slow to learn where to look; shallow ones learn it in minutes. The layers that
    come back afterwards begin as the identity, so that nothing is lost, and are trained then.
    """
    layers = language_model.layers
    language_model.layers = layers[:depth]
    try:
        yield
    finally:
        language_model.layers = layers
        for layer in layers[depth:]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)


def teach_gathering(
    prompts: Decoder,
    language_model: Any,
    readout: Readout,
    visual: Float[Tensor, "clips visual D"],
    labels: Int[Tensor, "clips slots"],
    house: House,
    config: PretrainConfig,
) -> Iterator[PretrainReport]:
    """Train on prefixes alone, until the facts can be read where they should."""
    before = torch.tensor([prompts.prompt(QUESTIONS[0]).before])
    rng = np.random.default_rng(config.seed)
    inner = [p for p in language_model.layers.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(inner, lr=config.muon_learning_rate, weight_decay=0.01)
    adamw = torch.optim.AdamW(readout.parameters(), lr=config.learning_rate, weight_decay=0.0)
    batch, step = 24, 0
    total = config.gathering_epochs * (len(visual) // batch)
    for _ in range(config.gathering_epochs):
        running = 0.0
        for chosen in np.array_split(rng.permutation(len(visual)), len(visual) // batch):
            scale = min(1.0, (step + 1) / 50) * (1 - 0.95 * step / total)
            muon.param_groups[0]["lr"] = config.muon_learning_rate * scale
            adamw.param_groups[0]["lr"] = config.learning_rate * scale
            start = language_model.embed_tokens(before).expand(len(chosen), -1, -1)
            prefix = torch.cat([start, visual[chosen]], dim=1)
            language_model(inputs_embeds=prefix, use_cache=False)
            loss = readout.loss(prefix.shape[1], labels[chosen])
            muon.zero_grad()
            adamw.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*inner, *readout.parameters()], 1.0)
            muon.step()
            adamw.step()
            step += 1
            running += loss.item()
        yield PretrainReport(f"{house}.gathering", step, running / (len(visual) // batch), {})


# ---------------------------------------------------------------- language


@dataclass(frozen=True)
class Rows:
    """A batch of clips: a visual prefix each, then segments of equal (padded) length.

    Every segment is one question with its answer; it sees the prefix and itself.
    """

    ids: Int[Tensor, "B S"]
    targets: Int[Tensor, "B S"]
    """Next token inside answers, -100 elsewhere."""
    num_prefix: int
    segment_length: int

    @property
    def positions(self) -> Int[Tensor, "1 S"]:
        prefix = torch.arange(self.num_prefix)
        segment = self.num_prefix + torch.arange(self.segment_length)
        num_segments = (self.ids.shape[1] - self.num_prefix) // self.segment_length
        return torch.cat([prefix, segment.repeat(num_segments)])[None]


def pack_rows(
    prompts: Decoder, num_visual: int, clips: Sequence[Sequence[tuple[str, str]]]
) -> Rows:
    """``clips``: per clip its (question, answer) texts. Visual positions get id 0."""
    (eos,) = prompts.eos_ids
    prefix = [*prompts.prompt(QUESTIONS[0]).before, *[0] * num_visual]
    segments = [
        [_segment(prompts, question, text, eos) for question, text in pairs] for pairs in clips
    ]
    length = max(len(ids) for clip in segments for ids, _ in clip)
    ids = [prefix + [i for ids, _ in clip for i in _fill(ids, length, 0)] for clip in segments]
    targets = [
        [-100] * len(prefix) + [i for _, ids in clip for i in _fill(ids, length, -100)]
        for clip in segments
    ]
    return Rows(torch.tensor(ids), torch.tensor(targets), len(prefix), length)


def _segment(prompts: Decoder, question: str, text: str, eos: int) -> tuple[list[int], list[int]]:
    after = list(prompts.prompt(question).after)
    spoken = prompts.tokenizer(text, add_special_tokens=False).input_ids
    return after + spoken, [-100] * (len(after) - 1) + spoken + [eos]


def _fill(ids: list[int], length: int, value: int) -> list[int]:
    return ids + [value] * (length - len(ids))


def language_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the decoder layers (for Muon) and everything else of the language model."""
    inner = [p for p in model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    return inner, [p for p in model.parameters() if id(p) not in chosen]


def teach_language(
    prompts: Decoder,
    model: Any,
    language_model: Any,
    visual: Float[Tensor, "clips visual D"],
    facts: Sequence[Facts],
    house: House,
    minutes: float,
    config: PretrainConfig,
    readout: Readout,
    labels: Int[Tensor, "clips slots"],
) -> Iterator[PretrainReport]:
    """Train the language model on frozen visual tokens for a given time; ``readout`` goes along.

    ``prompts`` only words the prompts: a decoder takes its model's weights over, so it is built
    on a copy of ``model``.
    """
    attend_in_segments(language_model)
    rng = np.random.default_rng(config.seed)
    inner, outer = language_parameters(language_model)
    outer = [*outer, model.lm_head.weight, *readout.parameters()]
    muon = torch.optim.Muon(inner, lr=config.muon_learning_rate, weight_decay=0.01)
    adamw = torch.optim.AdamW(outer, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    started, step, running = time.monotonic(), 0, 0.0
    order: list[int] = []
    while (elapsed := (time.monotonic() - started) / (60 * minutes)) < 1:
        if len(order) < config.batch_scenes:
            order = rng.permutation(len(facts)).tolist()
        chosen, order = order[: config.batch_scenes], order[config.batch_scenes :]
        rows = pack_rows(
            prompts,
            visual.shape[1],
            [
                [
                    (QUESTIONS[q], answer(facts[clip], int(q), house))
                    for q in rng.permutation(len(QUESTIONS))[: config.questions_per_scene]
                ]
                for clip in chosen
            ],
        )
        # Linear warm-up, then linear decay to a twentieth: the schedule knows only the time.
        scale = min(1.0, (step + 1) / 50) * max(0.05, 1 - elapsed)
        for optimizer, rate in ((muon, config.muon_learning_rate), (adamw, config.learning_rate)):
            optimizer.param_groups[0]["lr"] = rate * scale
        loss = _language_loss(model.lm_head, language_model, visual[chosen], rows)
        facts_loss = readout.loss(rows.num_prefix, labels[chosen])
        muon.zero_grad()
        adamw.zero_grad()
        (loss + facts_loss).backward()
        nn.utils.clip_grad_norm_([*inner, *outer], 1.0)
        muon.step()
        adamw.step()
        step += 1
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 25 == 0:
            metrics = {"share_of_time": elapsed, "facts_loss": facts_loss.item()}
            yield PretrainReport(f"{house}.language", step, running, metrics)


def _language_loss(
    lm_head: nn.Linear, language_model: Any, visual: Float[Tensor, "B visual D"], rows: Rows
) -> Float[Tensor, ""]:
    embeddings = language_model.embed_tokens(rows.ids)
    start = rows.num_prefix - visual.shape[1]
    embeddings = torch.cat([embeddings[:, :start], visual, embeddings[:, rows.num_prefix :]], dim=1)
    states = language_model(
        inputs_embeds=embeddings,
        position_ids=rows.positions,
        num_prefix=rows.num_prefix,
        segment_length=rows.segment_length,
        use_cache=False,
    ).last_hidden_state
    answered = rows.targets >= 0
    return functional.cross_entropy(lm_head(states[answered]), rows.targets[answered])


def normalise(images: UInt8[np.ndarray, "*batch H W 3"]) -> Float[Tensor, "*batch 3 H W"]:
    """Resized and cropped bytes to pixel values, as the image processor does it."""
    processing = tiny.processing()
    mean, std = torch.tensor(processing.mean), torch.tensor(processing.std)
    pixels = (torch.from_numpy(images).float() * processing.rescale_factor - mean) / std
    return pixels.movedim(-1, -3)


def visual_table(visual: Visual, images: UInt8[np.ndarray, "clips N H W 3"]) -> Tensor:
    """The frozen visual tokens of every clip, computed once."""
    with torch.no_grad():
        parts = [visual(normalise(images[i : i + 64])) for i in range(0, len(images), 64)]
    return torch.cat(parts)


# ---------------------------------------------------------------- the whole of it


@dataclass(frozen=True)
class TinyModels:
    """The two models in training, and the tokenizer they share."""

    drafter: EventGPT
    verifier: VideoLlava
    tokenizer: Any

    @classmethod
    def new(cls, config: PretrainConfig) -> TinyModels:
        torch.manual_seed(config.seed)
        drafter = EventGPT(tiny.drafter_config())
        verifier = VideoLlava(tiny.verifier_config())
        return cls(drafter, verifier, tiny.train_tokenizer(_texts(config)))

    def save(self, folder: Path) -> None:
        """Half precision on disk: the rounding is far below what training leaves open."""
        processing = tiny.processing()
        eventgpt.save(copy.deepcopy(self.drafter).half(), processing, folder / "drafter")
        video_llava.save(copy.deepcopy(self.verifier).half(), processing, folder / "verifier")
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


def pretrain(
    config: PretrainConfig, corpus: Corpus, models: TinyModels
) -> Iterator[PretrainReport]:
    """Train both models in place: verifier first, each facts first and then language."""
    verifier, drafter = models.verifier, models.drafter
    yield from _pretrain_one(
        "verifier",
        verifier,
        verifier.model.language_model,
        [
            *verifier.model.video_tower.parameters(),
            *verifier.model.multi_modal_projector.parameters(),
        ],
        lambda pixels: video_llava.visual_tokens(verifier, pixels),
        VideoLlavaDecoder(copy.deepcopy(verifier), models.tokenizer, tiny.processing()),
        corpus.frames,
        corpus.facts,
        config.language_minutes,
        config,
    )
    yield from _pretrain_one(
        "drafter",
        drafter,
        drafter.model,
        [
            *drafter.model.visual_tower.parameters(),
            *drafter.model.visual_projector.parameters(),
            *drafter.model.feature_adaptor.parameters(),
        ],
        drafter.visual_tokens,
        EventGPTDecoder(copy.deepcopy(drafter), models.tokenizer, tiny.processing()),
        corpus.events,
        corpus.facts,
        config.language_minutes / 4,
        config,
    )


def _pretrain_one(
    house: House,
    model: Any,
    language_model: Any,
    visual_parameters: list[nn.Parameter],
    visual: Visual,
    prompts: Decoder,
    images: UInt8[np.ndarray, "clips N H W 3"],
    facts: Sequence[Facts],
    minutes: float,
    config: PretrainConfig,
) -> Iterator[PretrainReport]:
    slots = VERIFIER_SLOTS if house == "verifier" else DRAFTER_SLOTS
    yield from teach_facts(visual, visual_parameters, images, facts, slots, config, house)
    tokens = visual_table(visual, images)
    labels = torch.tensor([[_label(fact, slot) for slot in slots] for fact in facts])
    readout = Readout(language_model, tokens.shape[2], slots)
    with shallow(language_model, readout.depth):
        yield from teach_gathering(prompts, language_model, readout, tokens, labels, house, config)
        yield from teach_language(
            prompts, model, language_model, tokens, facts, house, minutes, config, readout, labels
        )
    grown = minutes * config.grown_share
    if readout.depth < len(language_model.layers):
        yield from teach_language(
            prompts, model, language_model, tokens, facts, house, grown, config, readout, labels
        )
