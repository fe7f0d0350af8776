"""Drafting without a drafter: what a cycle costs beside drafting and its pass."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.policy import Adaptive
from xsd.pairs.base import Media
from xsd.types import Span


class Eager(Adaptive):
    """Decides as others do, but never rests, and thinks that rows are free."""

    def depth(self, limit: int) -> int:
        return limit


class Rote:
    """Drafts one token, whatever was said: a cycle without a drafter."""

    wants_projected = wants_prefilled = False

    def start(self, media: Media, question: str, watch: Stopwatch) -> None: ...
    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None: ...

    def gap_drafts(self) -> Draft:
        return Draft([])

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        return Draft([0])

    def finish(self) -> list[Span]:
        return []
