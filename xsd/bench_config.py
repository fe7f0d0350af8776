"""What the benchmark measures. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.decoding.config import DecodingConfig
from xsd.errors import XsdError


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
    batch_size: int = 1
    """Answers decoded at once, at most. Above 1 a ratio is to plain decoding of the same batches,
    and configs that cannot draft for a batch are left out."""
    share_visual: bool = True
    """The questions of a batch are about one clip, which is read once; false: about any, and every
    prompt is read whole."""
    max_failures: float = 0.02
    """Share of its samples that a config may lose, because it or plain decoding failed there in
    any repeat; where one loses more, the stage fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_questions", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise XsdError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_samples < 1 and self.max_samples != -1:
            raise XsdError(f"max_samples={self.max_samples}: must be at least 1, or -1 for all")
        if self.warmup < 0:
            raise XsdError(f"warmup={self.warmup}: must not be negative")
        if not 0.0 <= self.max_failures <= 1.0:
            raise XsdError(f"max_failures={self.max_failures}: must be a share between 0 and 1")
        alone = {
            f"last_chunk={self.last_chunk}": self.last_chunk > 0,
            "strict": self.strict,
        }
        refused = [name for name, is_set in alone.items() if is_set]
        if self.batch_size > 1 and refused:
            raise XsdError(
                f"batch_size={self.batch_size} goes without {', '.join(refused)}: batches are "
                "prefilled in one pass, and draft gamma tokens always"
            )
