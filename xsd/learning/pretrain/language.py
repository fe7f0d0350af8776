"""Then words: language models learn their house's answers on visual tokens that stay as they are.

Several questions of a clip share its visual prefix in one row, kept apart by the attention mask.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from xsd.learning.pretrain.config import PretrainConfig
from xsd.learning.pretrain.corpus import Slots
from xsd.learning.pretrain.state import Progress
from xsd.learning.pretrain.vision import PretrainReport, drawn_batches, products_in
from xsd.pairs.base import Decoder
from xsd.pairs.segments import attend_in_segments
from xsd.scenes.facts import Facts
from xsd.scenes.language import House, answer
from xsd.scenes.questions import QUESTIONS

MAX_LOADERS = 3
"""Processes that word lessons; two of them keep up with a GPU."""


class Readout(nn.Module):
    """Linear readings of the scene's facts from one layer, each at a visual position of its own.

    A deep language model is slow to find out, from answers alone, that it should gather what the
    frames show. Asked for the facts a third of the way up, it gathers them there; and as every
    fact has its own position (the last ones of the prefix), attention can look one up where a
    word calls for it. Training aid only.
    """

    def __init__(self, language_model: Any, width: int, slots: Slots, depth: int) -> None:
        """``depth``: the layer that is read, counted from 1."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList([nn.Linear(width, len(values)) for values in slots.values()])
        self.depth = depth
        self._state: Tensor | None = None
        self._hook = language_model.layers[self.depth - 1].register_forward_hook(self._keep)

    def remove(self) -> None:
        """Leave the language model as it was."""
        self._hook.remove()
        self._state = None

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


class Optimizers:
    """Muon for the matrices inside the decoder layers, AdamW for everything else.

    Linear warm-up over 50 steps, then linear decay to a twentieth of the peaks.
    """

    def __init__(
        self,
        inner: Sequence[nn.Parameter],
        outer: Sequence[nn.Parameter],
        config: PretrainConfig,
        num_steps: int,
    ) -> None:
        self.parameters = [*inner, *outer]
        self.num_steps, self.step_count = num_steps, 0
        self.parts = (
            torch.optim.Muon(inner, lr=config.muon_learning_rate, weight_decay=0.01),
            torch.optim.AdamW(outer, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
        )
        self.peaks = (config.muon_learning_rate, config.learning_rate)

    def step(self, loss: Float[Tensor, ""]) -> None:
        done = self.step_count / self.num_steps
        scale = min(1.0, (self.step_count + 1) / 50) * max(0.05, 1 - done)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = peak * scale
            part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]
        self.step_count += 1


def teach_gathering(
    prompts: Decoder,
    language_model: Any,
    readout: Readout,
    visual: Float[Tensor, "clips visual D"],
    labels: Int[Tensor, "clips slots"],
    house: House,
    config: PretrainConfig,
    progress: Progress,
) -> Iterator[PretrainReport]:
    """Train on prefixes alone, until the facts can be read where they should."""
    before = torch.tensor([prompts.prompt(QUESTIONS[0]).before], device=visual.device)
    inner = [p for p in language_model.layers.parameters() if p.ndim == 2]
    num_batches = len(visual) // config.gathering_batch
    total = config.gathering_epochs * num_batches
    optimizers = Optimizers(inner, list(readout.parameters()), config, total)
    running = torch.zeros((), device=visual.device)
    done = progress.begin("gathering", readout, optimizers.parts, running)
    optimizers.step_count = done
    for step, drawn in drawn_batches(
        0, len(visual), config.gathering_batch, config.gathering_epochs, config.seed, done
    ):
        if step % num_batches == 0:
            running.zero_()
        chosen = drawn.to(visual.device)
        start = language_model.embed_tokens(before).expand(len(chosen), -1, -1)
        prefix = torch.cat([start, visual[chosen]], dim=1)
        with products_in(config, visual.device):
            language_model(inputs_embeds=prefix, use_cache=False)
            loss = readout.loss(prefix.shape[1], labels[chosen])
        optimizers.step(loss)
        running += loss.detach()
        if (step + 1) % num_batches == 0:
            mean = float(running) / num_batches
            yield PretrainReport(f"{house}.gathering", step + 1, total, mean, {})
        progress.stepped()
    progress.save()


@dataclass(frozen=True)
class Rows:
    """A batch of clips: a visual prefix each, then segments of equal (padded) length.

    Every segment is one question with its answer; it sees the prefix and itself.
    """

    clips: Int[Tensor, " B"]
    ids: Int[Tensor, "B S"]
    targets: Int[Tensor, "B S"]
    """Next token inside answers, -100 elsewhere."""
    num_prefix: int
    segment_length: int

    @property
    def positions(self) -> Int[Tensor, "1 S"]:
        prefix = torch.arange(self.num_prefix, device=self.ids.device)
        segment = torch.arange(self.segment_length, device=self.ids.device) + self.num_prefix
        num_segments = (self.ids.shape[1] - self.num_prefix) // self.segment_length
        return torch.cat([prefix, segment.repeat(num_segments)])[None]

    def to(self, device: torch.device) -> Rows:
        clips, ids, targets = (
            x.to(device, non_blocking=True) for x in (self.clips, self.ids, self.targets)
        )
        return replace(self, clips=clips, ids=ids, targets=targets)


class Lessons(Dataset[Rows]):
    """Batches of questions with answers; which ones is a function of seed and step alone."""

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
        eos: int,
        num_visual: int,
        facts: Sequence[Facts],
        house: House,
        *,
        batch_scenes: int,
        questions_per_scene: int,
        num_steps: int,
        seed: int,
    ) -> None:
        """``prompts``: of each question, the ids before and after the visual tokens."""
        self.tokenizer, self.prompts, self.eos = tokenizer, prompts, eos
        self.num_visual, self.facts, self.house = num_visual, facts, house
        self.batch_scenes, self.questions_per_scene = batch_scenes, questions_per_scene
        self.num_steps, self.seed = num_steps, seed

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Rows:
        rng = np.random.default_rng((self.seed, step))
        per_epoch = max(1, len(self.facts) // self.batch_scenes)
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng((self.seed, epoch, 7)).permutation(len(self.facts))
        clips = order[index * self.batch_scenes : (index + 1) * self.batch_scenes]
        questions = [rng.permutation(len(QUESTIONS))[: self.questions_per_scene] for _ in clips]
        return self._pack(clips, questions)

    def _pack(self, clips: np.ndarray, questions: Sequence[np.ndarray]) -> Rows:
        segments = [
            [self._segment(int(clip), int(question)) for question in asked]
            for clip, asked in zip(clips, questions, strict=True)
        ]
        prefix = [*self.prompts[0][0], *[0] * self.num_visual]
        length = max(len(ids) for clip in segments for ids, _ in clip)
        ids = [prefix + [i for s, _ in clip for i in _fill(s, length, 0)] for clip in segments]
        targets = [
            [-100] * len(prefix) + [i for _, t in clip for i in _fill(t, length, -100)]
            for clip in segments
        ]
        return Rows(
            torch.from_numpy(clips), torch.tensor(ids), torch.tensor(targets), len(prefix), length
        )

    def _segment(self, clip: int, question: int) -> tuple[list[int], list[int]]:
        after = list(self.prompts[question][1])
        text = answer(self.facts[clip], question, self.house)
        spoken = self.tokenizer(text, add_special_tokens=False).input_ids
        return after + spoken, [-100] * (len(after) - 1) + spoken + [self.eos]


def _fill(ids: list[int], length: int, value: int) -> list[int]:
    return ids + [value] * (length - len(ids))


def start_loaders() -> None:
    """Start, in the background, the server that the processes which word lessons are forked of."""
    multiprocessing.set_forkserver_preload([__name__])
    forkserver.ensure_running()


def _as_it_is(rows: Any) -> Any:
    return rows


def language_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the decoder layers (for Muon) and everything else of the language model."""
    inner = [p for p in model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    return inner, [p for p in model.parameters() if id(p) not in chosen]


def teach_language(
    lessons: Lessons,
    model: Any,
    language_model: Any,
    visual: Float[Tensor, "clips visual D"],
    readout: Readout,
    labels: Int[Tensor, "clips slots"],
    config: PretrainConfig,
    progress: Progress,
    phase: str = "language",
) -> Iterator[PretrainReport]:
    """Train the language model on frozen visual tokens; ``readout`` goes along."""
    attend_in_segments(language_model)
    inner, outer = language_parameters(language_model)
    outer = [*outer, model.lm_head.weight, *readout.parameters()]
    optimizers = Optimizers(inner, outer, config, len(lessons))
    running = torch.zeros((), device=visual.device)
    done = progress.begin(phase, readout, optimizers.parts, running)
    optimizers.step_count = done
    batches = DataLoader(
        Subset(lessons, range(done, len(lessons))),
        batch_size=None,
        num_workers=min(config.num_workers, MAX_LOADERS),
        collate_fn=_as_it_is,
        # A fork of a process that holds a GPU takes many seconds, and so does one that loads
        # PyTorch anew; the server has loaded it while the facts were taught.
        multiprocessing_context="forkserver" if config.num_workers else None,
    )
    for step, rows in enumerate(batches, start=done):
        rows = rows.to(visual.device)
        with products_in(config, visual.device):
            loss = _language_loss(model.lm_head, language_model, visual[rows.clips], rows)
            facts_loss = readout.loss(rows.num_prefix, labels[rows.clips])
        optimizers.step(loss + facts_loss)
        running.lerp_(loss.detach().float(), 1.0 if step == 0 else 0.05)
        if (step + 1) % 25 == 0 or step + 1 == len(lessons):
            yield PretrainReport(
                f"{lessons.house}.language",
                step + 1,
                len(lessons),
                float(running),
                {"facts_loss": float(facts_loss.detach())},
            )
        progress.stepped()
    progress.save()


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
