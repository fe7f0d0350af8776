"""An answer, with its clock readings and counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from xsd.types import Span


@dataclass
class Decoded:
    """One answer with its clock readings (milliseconds) and draft counts."""

    token_ids: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    total_ms: float = 0.0
    drafting_ms: float = 0.0
    """Of decode, waiting for drafts."""
    num_free: int = 0
    """Drafts that were ready when the prefill ended."""
    gap_drafted: int = 0
    gap_accepted: int = 0
    cycle_drafted: list[int] = field(default_factory=list)
    cycle_accepted: list[int] = field(default_factory=list)
    timeline: list[Span] = field(default_factory=list)

    @property
    def decode_ms(self) -> float:
        return self.total_ms - self.prefill_ms
