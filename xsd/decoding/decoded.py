"""An answer, with its clock readings and counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from xsd.types import Span

PIXELS, VISION, PREFILL = "pixels", "vision", "language prefill"
DRAFTING, PASSES, LM_HEAD, REST = "drafting", "verifier passes", "LM head", "rest"
PARTS = (PIXELS, VISION, PREFILL, DRAFTING, PASSES, LM_HEAD, REST)
"""Image processor; vision tower and projector; the prompt's way through the language model; waiting
for drafts, in the gap, in decode, and at the end for who still drafts; passes of decode, plain
steps too; choosing tokens after the prefill and in compiled passes (others choose within their
pass); all else."""


@dataclass
class Decoded:
    """One answer with its clock readings (milliseconds) and draft counts."""

    token_ids: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    total_ms: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Milliseconds of ``total_ms`` by part (``PARTS``); empty: of a batch."""
    num_free: int = 0
    """Drafts that were ready when the prefill ended."""
    gap_drafted: int = 0
    gap_accepted: int = 0
    cycle_drafted: list[int] = field(default_factory=list)
    cycle_accepted: list[int] = field(default_factory=list)
    unread_ms: list[float] = field(default_factory=list)
    """Drafting, of every cycle whose drafts were verified before anybody read them."""
    timeline: list[Span] = field(default_factory=list)
    made_captures: bool = False
    """Whether it took longer for what need not be done again."""

    @property
    def decode_ms(self) -> float:
        return self.total_ms - self.prefill_ms
