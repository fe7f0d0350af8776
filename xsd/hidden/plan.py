"""What is answered together, and where it is stored: a pure function of scenes and configuration.

Arithmetic on a padded batch depends in its last bits on who shares the batch. As batches are fixed
beforehand, an extraction that was interrupted and resumed stores the same bytes as one that ran
through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xsd.errors import XsdError
from xsd.files import sha256_json
from xsd.hidden.config import ExtractConfig
from xsd.hidden.index import Failure, Half
from xsd.hidden.sample import ClipVisual, HiddenSample
from xsd.scenes.dsec import samples
from xsd.scenes.questions import QUESTIONS
from xsd.types import Sample, Scene


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips answered together: part ``part`` of chunk ``chunk``."""

    chunk: int
    part: int
    is_last: bool
    """Its chunk is full after it."""
    samples: tuple[Sample, ...]
    """Whole clips, clip after clip, all with the same questions in the same order."""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        return tuple({sample.scene.key: sample.scene for sample in self.samples}.values())


@dataclass(frozen=True)
class Extracted:
    """What came of one batch: answers and failures in its order, and what its clips share."""

    batch: Batch
    samples: tuple[HiddenSample, ...]
    visuals: tuple[ClipVisual, ...]
    failures: tuple[Failure, ...]
    num_halvings: int = 0
    """Times that a batch, or a part of it, did not fit into memory and was halved."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of each part of the work; "reading" overlaps the others, "waiting" for it does not."""


def plan_batches(
    scenes: Sequence[Scene], half: Half, config: ExtractConfig, batch_clips: int
) -> list[Batch]:
    """All batches of one half of the data, in the order in which they are to be answered.

    Raises:
        XsdError: that half has no scenes.
    """
    members = [scene for scene in scenes if (scene.split == "test") == (half == "test")]
    chosen = _spread(members, config.max_samples)
    if not chosen:
        raise XsdError(f"the data set has no {half} scenes to extract; make some, or leave it out")
    num_questions = min(config.max_questions, len(QUESTIONS))
    clips_per_chunk = max(1, config.chunk_size // num_questions)
    batches = []
    for chunk, start in enumerate(range(0, len(chosen), clips_per_chunk)):
        clips = chosen[start : start + clips_per_chunk]
        starts = range(0, len(clips), batch_clips)
        for part, first in enumerate(starts):
            asked = tuple(samples(clips[first : first + batch_clips], num_questions))
            batches.append(Batch(chunk, part, part == len(starts) - 1, asked))
    return batches


def digest(batches: Sequence[Batch], data: str) -> str:
    """Of the plan, and of the scenes' content as ``data`` (a digest) stands for it."""
    return sha256_json(
        [data, [[(s.key, s.scene.split, s.question) for s in batch.samples] for batch in batches]]
    )


def _spread(scenes: Sequence[Scene], limit: int) -> list[Scene]:
    """``limit`` of them, evenly over the list, so that every recording keeps its share."""
    if limit < 0 or limit >= len(scenes):
        return list(scenes)
    return [scenes[position * len(scenes) // limit] for position in range(limit)]
