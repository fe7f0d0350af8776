"""Both models on the same clips and questions: a generator of paired states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.errors import XsdError
from xsd.hidden.config import ExtractConfig
from xsd.hidden.index import Failure, Half, Header
from xsd.hidden.media import read_media
from xsd.hidden.plan import Batch, Extracted, digest
from xsd.hidden.prefix import SharedPrefix, share_prefix
from xsd.hidden.store import HiddenStore
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Decoder, Media, ModelPair
from xsd.pairs.generate import Answer, generate, teacher_force
from xsd.types import ClipVisual, HiddenSample, Sample

_CACHE_BYTES = 128 << 20
_MAX_CLIPS = 16
DURATION = "1s"


def extract(
    pair: ModelPair,
    batches: Sequence[Batch],
    config: ExtractConfig,
    said: HiddenStore | None = None,
) -> Iterator[Extracted]:
    """Answer batch after batch.

    ``said``: an extraction that differs in conditioning alone. What the verifier answers does not
    depend on that, and rounding what was rounded changes nothing, so its side is taken from there.

    A clip that cannot be read, or an answer whose states are not finite, is a counted failure.
    """
    for batch in batches:
        clips, failures = _read_clips(pair, batch)
        samples = [s for s in batch.samples if s.scene.key in clips]
        if samples:
            with pair.on_all_cores():
                answered, visuals, broken = _answer(pair, clips, samples, config, said)
        else:
            answered, visuals, broken = [], [], {}
        failures |= broken
        yield Extracted(
            batch,
            tuple(answered),
            tuple(visuals),
            tuple(Failure(s.key, failures[s.key]) for s in batch.samples if s.key in failures),
        )


def header(
    pair: ModelPair, batches: Sequence[Batch], half: Half, config: ExtractConfig, data: str
) -> Header:
    """What decides the content of a folder; ``data`` is the digest of the scenes."""
    is_padded = config.chunk_format == "pt"
    return Header(
        pair=pair.name,
        provenance=pair.provenance,
        conditioning=config.conditioning,
        dtype="fp32" if is_padded else config.dtype,
        chunk_format=config.chunk_format,
        d_drafter=pair.drafter.width,
        d_verifier=pair.verifier.width,
        chunk_size=config.chunk_size,
        config={
            "split": half,
            "duration": DURATION,
            "quant": pair.quant,
            "max_questions": config.max_questions,
            "max_new_tokens": config.max_new_tokens,
            "hidden_dim": pair.verifier.width,
            "vocab_size": pair.vocab_size,
            **_layers_kept(pair, config),
        },
        plan=digest(batches, data),
    )


def _layers_kept(pair: ModelPair, config: ExtractConfig) -> dict[str, list[int]]:
    if config.verifier_layers is None:
        return {}
    stack: Any = pair.verifier.stack
    return {"verifier_layers": list(config.layer_numbers(stack.num_layers))}


def clips_together(pair: ModelPair, config: ExtractConfig) -> int:
    """Clips in a batch: asked for, or what a limited cache of the verifier has room for."""
    if config.batch_clips is not None:
        return config.batch_clips
    stack = pair.verifier.stack
    per_clip = stack.new_cache(1, 1).num_bytes * stack.max_positions * config.max_questions
    return max(1, min(_MAX_CLIPS, _CACHE_BYTES // per_clip))


def _read_clips(pair: ModelPair, batch: Batch) -> tuple[dict[str, Media], dict[str, str]]:
    """Media by scene key, and the reason by sample key of those that cannot be read."""
    clips: dict[str, Media] = {}
    failures: dict[str, str] = {}
    for scene in batch.scenes:
        try:
            clips[scene.key] = read_media(scene, pair.num_event_images, pair.num_frames)
        except XsdError as error:
            failures |= {s.key: str(error) for s in batch.samples if s.scene.key == scene.key}
    return clips, failures


@torch.inference_mode()
def _answer(
    pair: ModelPair,
    clips: dict[str, Media],
    samples: Sequence[Sample],
    config: ExtractConfig,
    said: HiddenStore | None,
) -> tuple[list[HiddenSample], list[ClipVisual], dict[str, str]]:
    questions = [s.question for s in samples[: len(samples) // len(clips)]]
    if said is not None and all(s.key in said for s in samples):
        kept = [said.sample(s.key) for s in samples]
        answers = [Answer(sample.verifier_ids, sample.verifier_hidden) for sample in kept]
        layers = [sample.verifier_layers for sample in kept]
        visuals = [said.visual(scene) for scene in clips]
    else:
        verifier, rests = _begin(pair.verifier, clips, questions, config)
        answers = generate(verifier, rests, config.max_new_tokens)
        layers = _layer_states(verifier, rests, answers, config)
        visuals = _visual_states(verifier, list(clips), pair.verifier.prompt(questions[0]).before)
    drafts = _draft(pair, clips, questions, answers, config)
    answered: list[HiddenSample] = []
    failures: dict[str, str] = {}
    for sample, answer, draft, layer in zip(samples, answers, drafts, layers, strict=True):
        states = {"drafter": draft.hidden, "verifier": answer.hidden}
        broken = [role for role, x in states.items() if not bool(x.isfinite().all())]
        if broken:
            failures[sample.key] = f"the {broken[0]}'s states are not finite"
            continue
        answered.append(
            HiddenSample(
                key=sample.key,
                drafter_hidden=draft.hidden.cpu(),
                verifier_hidden=answer.hidden.cpu(),
                drafter_ids=draft.ids.cpu(),
                verifier_ids=answer.ids.cpu(),
                verifier_layers=None if layer is None else layer.cpu(),
            )
        )
    return answered, visuals, failures


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
    clips: dict[str, Media],
    questions: Sequence[str],
    answers: Sequence[Answer],
    config: ExtractConfig,
) -> list[Answer]:
    """The drafter's side: fed the verifier's answers, or left to its own."""
    drafter, rests = _begin(pair.drafter, clips, questions, config)
    if config.conditioning == "free_running":
        return generate(drafter, rests, config.max_new_tokens)
    device = pair.drafter.stack.device
    ids = [answer.ids.to(device) for answer in answers]
    states = teacher_force(drafter, rests, ids)
    return [Answer(row, hidden) for row, hidden in zip(ids, states, strict=True)]


def _begin(
    decoder: Decoder, clips: dict[str, Media], questions: Sequence[str], config: ExtractConfig
) -> tuple[SharedPrefix, list[Float[Tensor, "_R D"]]]:
    visual = [decoder.visual_tokens(decoder.pixels(media)) for media in clips.values()]
    return share_prefix(decoder, visual, questions, config.max_new_tokens)


def _visual_states(
    verifier: SharedPrefix, scene_keys: Sequence[str], before: tuple[int, ...]
) -> list[ClipVisual]:
    """A clip's visual vectors before the language model and behind it, from the one prefill."""
    return [
        ClipVisual(
            key,
            projected=pool_visual(projected[len(before) :]).cpu(),
            prefilled=pool_visual(prefilled[len(before) :]).cpu(),
        )
        for key, projected, prefilled in zip(
            scene_keys, verifier.prefixes, verifier.states, strict=True
        )
    ]
