"""What the verifier's passes cost on this machine, and what follows from that alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xsd.decoding.decoded import Decoded

NOISE = 0.05
"""Share by which two measurements of a pass, or of answers, may differ."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the verifier's passes on this machine, measured."""

    verify_ms: Sequence[float]
    """Of passes of 1, 2, ... rows behind a prompt; never falling."""
    prefill_ms: float
    """Plain decoding's, clock start to first token."""
    cycle_ms: float = 0.0
    """What a cycle takes beside drafting and its pass, where it is one of many calls."""

    def verify(self, num_rows: int) -> float:
        return self.verify_ms[min(num_rows, len(self.verify_ms)) - 1]

    @property
    def step(self) -> float:
        return self.verify_ms[0]

    def plain_ms(self, num_tokens: int) -> float:
        return self.prefill_ms + (num_tokens - 1) * self.step

    def answer_ms(self, answer: Decoded, first_ms: float, level_ms: float, gamma: int) -> float:
        """What an answer of such counts takes, if drafting in the prefill slows nothing.

        Args:
            first_ms, level_ms: of drafting, a cycle's first level and each further one.
            gamma: levels of a draft, at most: a tree has more tokens than levels.
        """
        ms = self.prefill_ms
        num_early = 1
        if answer.gap_accepted and answer.gap_drafted > 1:
            # The prefill checked the first; its token and the other drafts are one pass.
            ms += self.verify(answer.gap_drafted)
            num_early += answer.gap_accepted
        for drafted in answer.cycle_drafted:
            ms += first_ms + (min(drafted, gamma) - 1) * level_ms + self.verify(drafted + 1)
        num_cycles = len(answer.cycle_drafted)
        num_said = num_early + sum(answer.cycle_accepted) + num_cycles
        return ms + max(0, len(answer.token_ids) - num_said) * self.step


def row_sizes(verify_ms: Sequence[float]) -> tuple[int, ...]:
    """Of how many rows a pass of 1, 2, ... rows is best made, given what such passes cost.

    More rows may cost less where they take another kernel: 4-bit weights of 22 rows are read
    slower than those of 32. Less than noise is no reason.
    """
    sizes = []
    for num_rows, ms in enumerate(verify_ms, start=1):
        best = min(range(num_rows, len(verify_ms) + 1), key=lambda size: verify_ms[size - 1])
        pays = verify_ms[best - 1] < (1.0 - NOISE) * ms
        sizes.append(best if pays else num_rows)
    return tuple(sizes)


def nearer(known: float, seen: float) -> float:
    """What is known, a step towards what was seen last: so it follows the median, for a machine
    that was busy for a moment is no slower for that."""
    return known * (1.0 + NOISE if seen > known else 1.0 - NOISE)
