"""What can be asked of the extraction stage; torch-free, so that ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xsd.errors import XsdError


@dataclass(frozen=True)
class ExtractConfig:
    """Which answers are given, how the two models are paired on them, and what is kept."""

    dataset_dir: str | None = None
    """Scenes: folder or runs:/ URI; null: the newest of the pair, made if there are none."""
    output_dir: Path | None = None
    """Where the chunks go; null: a folder of their own in outputs/extract."""
    split: Literal["all", "train", "test"] = "all"
    """'train' holds the train and the val recordings, each sample tagged with its own."""
    conditioning: Literal["teacher_forced", "free_running"] = "teacher_forced"
    """teacher_forced: the drafter is fed the verifier's answer; free_running: its own text."""
    max_samples: int = -1
    """Clips of a split, spread evenly over it; -1: all."""
    max_questions: int = 10
    """Questions asked about a clip."""
    max_new_tokens: int = 50
    """Longest answer."""
    chunk_size: int = 1000
    """Answers in a chunk; rounded down to whole clips."""
    chunk_format: Literal["safetensors", "pt"] = "safetensors"
    """pt: the padded float32 chunks of the published pipeline, without ids and visual states."""
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Precision of the stored states; fp8 has a factor a position."""
    verifier_layers: str | None = None
    """Further layers of the verifier to keep, for heads that fuse several: numbers from 1 or, below
    0, from the top, as in 2,16,-3; null: the last one's states after the norm, and no others."""
    batch_clips: int | None = None
    """Clips that are answered together; null: 1 to 16, by the size of their caches."""
    max_failures: float = 0.02
    """Share of answers that may fail before the stage does."""

    def __post_init__(self) -> None:
        for name in ("max_questions", "max_new_tokens", "chunk_size"):
            if getattr(self, name) < 1:
                raise XsdError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.batch_clips is not None and self.batch_clips < 1:
            raise XsdError(f"batch_clips={self.batch_clips}: must be at least 1")
        if self.max_samples < 1 and self.max_samples != -1:
            raise XsdError(f"max_samples={self.max_samples}: must be at least 1, or -1 for all")
        if self.verifier_layers is not None and self.chunk_format == "pt":
            raise XsdError("verifier_layers: the pt format has no place for them; say safetensors")
        if not 0.0 <= self.max_failures <= 1.0:
            raise XsdError(f"max_failures={self.max_failures}: must be a share between 0 and 1")

    def layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """``verifier_layers`` as numbers from 1 up.

        Raises:
            XsdError: not numbers, or not of a verifier with ``num_layers``.
        """
        named = [] if self.verifier_layers is None else self.verifier_layers.split(",")
        try:
            found = [int(text) for text in named]
        except ValueError as error:
            raise XsdError(f"verifier_layers={self.verifier_layers}: not layer numbers") from error
        numbers = [n + num_layers + 1 if n < 0 else n for n in found]
        for number in numbers:
            if not 1 <= number <= num_layers:
                raise XsdError(
                    f"verifier_layers={self.verifier_layers}: the verifier has {num_layers} layers"
                )
        return tuple(dict.fromkeys(numbers))
