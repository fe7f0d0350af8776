"""A batch of clips and questions, answered by both models in as few passes as there can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Float
from torch import Tensor

from xsd.clock import PartTimes
from xsd.errors import XsdError
from xsd.hidden.config import ExtractConfig
from xsd.hidden.media import ClipPixels
from xsd.hidden.prefix import SharedPrefix, share_prefix
from xsd.hidden.sample import ClipVisual, HiddenSample
from xsd.hidden.store import HiddenStore
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.generate import Answer, generate, teacher_force
from xsd.types import Sample


@dataclass
class Answered:
    """What came of some questions."""

    samples: list[HiddenSample] = field(default_factory=list)
    visuals: dict[str, ClipVisual] = field(default_factory=dict)
    """By scene key."""
    failures: dict[str, str] = field(default_factory=dict)
    """The reason, by sample key."""
    num_halvings: int = 0

    def add(self, other: Answered) -> None:
        self.samples += other.samples
        self.visuals |= other.visuals
        self.failures |= other.failures
        self.num_halvings += other.num_halvings


def answer(
    pair: ModelPair,
    clips: Mapping[str, ClipPixels],
    samples: Sequence[Sample],
    config: ExtractConfig,
    said: HiddenStore | None,
    times: PartTimes,
) -> Answered:
    """Answers to samples of whole clips, all together, or in halves where memory is too small.

    Halves are tried anew for every batch: what was answered with what then does not depend on
    where an extraction was interrupted.

    Raises:
        XsdError: one answer does not fit.
    """
    if not samples:
        return Answered()
    try:
        return _together(pair, clips, samples, config, said, times)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        if len(samples) == 1:
            raise XsdError(
                f"{samples[0].key}: memory does not suffice for one answer; lower "
                "--max_new_tokens or choose a lower --quant"
            ) from error
    # Only here has the failed attempt's memory no owner any more.
    clear_device_cache(garbage_collection=True)
    found = Answered(num_halvings=1)
    for half in _halves(samples):
        found.add(answer(pair, clips, half, config, said, times))
    return found


def _halves(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    """Of the clips; of one clip, of its questions."""
    scenes = list(dict.fromkeys(sample.scene.key for sample in samples))
    if len(scenes) == 1:
        middle = len(samples) // 2
    else:
        middle = len(samples) // len(scenes) * (len(scenes) // 2)
    return [samples[:middle], samples[middle:]]


def _together(
    pair: ModelPair,
    clips: Mapping[str, ClipPixels],
    samples: Sequence[Sample],
    config: ExtractConfig,
    said: HiddenStore | None,
    times: PartTimes,
) -> Answered:
    scenes = list(dict.fromkeys(sample.scene.key for sample in samples))
    questions = [s.question for s in samples[: len(samples) // len(scenes)]]
    if said is not None and all(s.key in said for s in samples):
        kept = [said.sample(s.key) for s in samples]
        answers = [Answer(sample.verifier_ids, sample.verifier_hidden) for sample in kept]
        layers = [sample.verifier_layers for sample in kept]
        visuals = {scene: said.visual(scene) for scene in scenes}
    else:
        pixels = [clips[scene].verifier for scene in scenes]
        verifier, rests = _begin(pair.verifier, pixels, questions, config, times, "verifier")
        with times.part("verifier decode"):
            answers = generate(verifier, rests, config.max_new_tokens)
        with times.part("verifier layers"):
            layers = _layer_states(verifier, rests, answers, config)
        visuals = _visual_states(verifier, scenes, pair.verifier.prompt(questions[0]).before)
    pixels = [clips[scene].drafter for scene in scenes]
    drafts = _draft(pair, pixels, questions, answers, config, times)
    with times.part("to host"):
        return _paired(samples, answers, drafts, layers, visuals)


def _paired(
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    drafts: Sequence[Answer],
    layers: Sequence[Float[Tensor, "_T layers D"] | None],
    visuals: dict[str, ClipVisual],
) -> Answered:
    """Both sides in host memory; states that are not finite are a failure."""
    found = Answered(visuals=visuals)
    for sample, said, draft, layer in zip(samples, answers, drafts, layers, strict=True):
        states = {"drafter": draft.hidden.cpu(), "verifier": said.hidden.cpu()}
        broken = [role for role, x in states.items() if not bool(x.isfinite().all())]
        if broken:
            found.failures[sample.key] = f"the {broken[0]}'s states are not finite"
            continue
        found.samples.append(
            HiddenSample(
                key=sample.key,
                drafter_hidden=states["drafter"],
                verifier_hidden=states["verifier"],
                drafter_ids=draft.ids.cpu(),
                verifier_ids=said.ids.cpu(),
                verifier_layers=None if layer is None else layer.cpu(),
            )
        )
    return found


def _layer_states(
    verifier: SharedPrefix,
    rests: Sequence[Float[Tensor, "_R D"]],
    answers: Sequence[Answer],
    config: ExtractConfig,
) -> list[Float[Tensor, "_T layers D"] | None]:
    """Outputs of the layers asked for, while the verifier is fed its own answers once more.

    Raises:
        XsdError: a layer that is not there, or a verifier that does not show its layers.
    """
    if config.verifier_layers is None:
        return [None] * len(answers)
    stack: Any = verifier.stack
    if not hasattr(stack, "tap"):
        raise XsdError("verifier_layers: this pair's verifier does not show its layers")
    wanted = config.layer_numbers(stack.num_layers)
    seen: dict[int, Tensor] = {}

    def tap(number: int, rows: Tensor) -> None:
        if number in wanted:
            seen[number] = rows

    stack.tap = tap
    try:
        teacher_force(verifier, rests, [answer.ids for answer in answers])
    finally:
        stack.tap = None
    shown = torch.stack([seen[number] for number in wanted], dim=2)
    return [rows[-len(a.ids) :] for rows, a in zip(shown, answers, strict=True)]


def _draft(
    pair: ModelPair,
    pixels: Sequence[Float[Tensor, "N 3 H W"]],
    questions: Sequence[str],
    answers: Sequence[Answer],
    config: ExtractConfig,
    times: PartTimes,
) -> list[Answer]:
    """The drafter's side: fed the verifier's answers, or left to its own."""
    drafter, rests = _begin(pair.drafter, pixels, questions, config, times, "drafter")
    if config.conditioning == "free_running":
        with times.part("drafter decode"):
            return generate(drafter, rests, config.max_new_tokens)
    device = pair.drafter.stack.device
    ids = [answer.ids.to(device) for answer in answers]
    with times.part("drafter forced pass"):
        states = teacher_force(drafter, rests, ids)
    return [Answer(row, hidden) for row, hidden in zip(ids, states, strict=True)]


def _begin(
    decoder: Decoder,
    pixels: Sequence[Float[Tensor, "N 3 H W"]],
    questions: Sequence[str],
    config: ExtractConfig,
    times: PartTimes,
    role: str,
) -> tuple[SharedPrefix, list[Float[Tensor, "_R D"]]]:
    with times.part(f"{role} vision"):
        visual = [decoder.visual_tokens(images) for images in pixels]
    with times.part(f"{role} prefix"):
        return share_prefix(decoder, visual, questions, config.max_new_tokens)


def _visual_states(
    verifier: SharedPrefix, scene_keys: Sequence[str], before: tuple[int, ...]
) -> dict[str, ClipVisual]:
    """A clip's visual vectors before the language model and behind it, from the one prefill."""
    return {
        key: ClipVisual(
            key,
            projected=pool_visual(projected[len(before) :]).cpu(),
            prefilled=pool_visual(prefilled[len(before) :]).cpu(),
        )
        for key, projected, prefilled in zip(
            scene_keys, verifier.prefixes, verifier.states, strict=True
        )
    }
