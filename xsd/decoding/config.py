"""Decoding options and the names of strategies. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.errors import XsdError

GAP_LEVELS = ("L1", "L2", "L3", "L4", "X1")
HEAD_LEVELS = ("L5", "B1", "L5F", "E1", "E2", "E3")
BASELINE = "vl_baseline"
ALL_CONFIGS = (
    BASELINE,
    *(f"{level}+VL" for level in GAP_LEVELS),
    "L4+VL:free",
    *(f"{level}_decode" for level in HEAD_LEVELS),
    "L4+L5F",
    "X1+E3",
    "drafter+VL",
    "template+VL",
)


@dataclass(frozen=True)
class DecodingConfig:
    """How drafts are made and checked."""

    max_new_tokens: int = 50
    """Longest answer."""
    gamma: int = 4
    """Drafts per verifier call in decode (the seed's benchmark: 1)."""
    overlap: Literal["process", "inline"] = "process"
    """process: the drafter runs beside the verifier's prefill in a process of its own; inline: it
    runs before the prefill in the same process, and its time counts in full."""
    max_gap_drafts: int = 22
    """No more drafts than this in the prefill gap (inline: exactly so many)."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "gamma"):
            if getattr(self, name) < 1:
                raise XsdError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_gap_drafts < 0:
            raise XsdError(f"max_gap_drafts={self.max_gap_drafts}: must not be negative")
