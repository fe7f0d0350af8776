"""Both models on the same clips and questions: a generator of paired states.

What is answered together, and how, is in ``answer``; what is stored together, in ``plan``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from xsd.clock import PartTimes
from xsd.hidden.ahead import ahead
from xsd.hidden.answer import answer
from xsd.hidden.config import ExtractConfig
from xsd.hidden.index import Failure, Half, Header
from xsd.hidden.media import read_clips
from xsd.hidden.plan import Batch, Extracted, digest
from xsd.hidden.store import HiddenStore
from xsd.pairs.base import ModelPair

_CACHE_BYTES = 128 << 20
_MAX_CLIPS = 16
DURATION = "1s"


def extract(
    pair: ModelPair,
    batches: Sequence[Batch],
    config: ExtractConfig,
    said: HiddenStore | None = None,
) -> Iterator[Extracted]:
    """Answer batch after batch; the next one's media are decoded meanwhile.

    ``said``: an extraction that differs in conditioning alone. What the verifier answers does not
    depend on that, and rounding what was rounded changes nothing, so its side is taken from there.

    A clip that cannot be read, or an answer whose states are not finite, is a counted failure. A
    batch that does not fit into memory is answered in halves; what is stored together stays so.

    Raises:
        XsdError: memory does not suffice for one answer.
    """
    times = PartTimes(pair.verifier.stack.device)
    reading = ahead(read_clips(pair, batch) for batch in batches)
    for batch in batches:
        with times.part("waiting"):
            clips = next(reading)
        samples = [s for s in batch.samples if s.scene.key in clips.pixels]
        with pair.on_all_cores(), torch.inference_mode():
            found = answer(pair, clips.pixels, samples, config, said, times)
        failures = clips.failures | found.failures
        yield Extracted(
            batch,
            tuple(found.samples),
            tuple(found.visuals.values()),
            tuple(Failure(s.key, failures[s.key]) for s in batch.samples if s.key in failures),
            found.num_halvings,
            {**times.seconds, "reading": clips.seconds},
        )
        times.seconds.clear()


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
