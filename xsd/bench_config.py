"""What the benchmark measures. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.decoding.config import DecodingConfig


@dataclass(frozen=True)
class BenchConfig(DecodingConfig):
    """Samples, strategies and repeats of a benchmark."""

    configs: str = "all"
    """Comma-separated strategies, or 'all'; the plain baseline is always measured beside them."""
    control: str | None = None
    """shuffled_events: every config with a drafter once more, on another scene's events."""
    max_samples: int = 50
    """Question-clip samples of the split, spread over its clips; -1: all."""
    max_questions: int = 10
    """Questions a clip."""
    split: Literal["train", "val", "test"] = "test"
    """Split of the scenes."""
    repeats: int = 3
    """Interleaved repeats of every sample; a sample's time is their median."""
    warmup: int = 3
    """Samples decoded first, outside the measurement."""
    max_failures: float = 0.02
    """Share of failed decodings at which the stage fails."""
