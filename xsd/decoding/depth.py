"""How deep to draft where a draft is made whole: its drafter cannot stop where it gets unsure."""

from __future__ import annotations

import statistics

from xsd.decoding.accept import Draft
from xsd.decoding.config import MAX_GAMMA
from xsd.decoding.costs import NOISE, Costs, nearer
from xsd.kernels import rule as rules

_MEMORY = 0.99
"""Weight that what was seen keeps from one cycle to the next."""
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""To choose from: each is captured anew, and neighbours among the deep ones differ by little."""
_FIRST_RATE = 0.7
"""How often a first draft is thought to hold, and every further one as often as the one before."""


class Depths:
    """The depth by which a token takes least, from what became of drafts and what they took."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._tried = [0.0] * MAX_GAMMA
        self._held = [0.0] * MAX_GAMMA
        self._drafting_ms: dict[int, float] = {}
        """By depth."""
        self._beside_ms = 0.0
        """What a cycle takes beside its draft and the pass, as that was measured."""
        self._sizes: dict[int, int] = {}
        """Tokens of the last draft of a depth, where it was a tree."""
        self._deepest = 0
        self.chosen = 0
        """0: not yet, and drafts are as deep as they may be."""

    def best(self, limit: int) -> int:
        """1..limit; ``limit`` until drafts have been timed."""
        self._deepest = max(self._deepest, limit)
        if self._drafting_ms:
            each = self._token_ms()
            depths = {min(depth, self._deepest) for depth in _DEPTHS}
            best = min(depths, key=lambda depth: each[depth - 1])
            # Less than noise is no reason to change.
            if each[best - 1] < (1.0 - NOISE) * each[(self.chosen or self._deepest) - 1]:
                self.chosen = best
        return min(limit, self.chosen or limit)

    def learn_drafting(self, first_ms: float, level_ms: float) -> None:
        """What a draft's first level was measured to cost, and each further one."""
        self._drafting_ms = {
            depth: first_ms + (depth - 1) * level_ms for depth in (1, MAX_GAMMA // 2)
        }

    def time(self, draft: Draft, drafting_ms: float, verifying_ms: float) -> None:
        """What a cycle took."""
        depth, num_rows = max(1, draft.depth), len(draft) + 1
        known = self._drafting_ms.get(depth)
        if known is None:
            # One alone may have been slow for a moment.
            base_ms, level_ms = self._line() if self._drafting_ms else (drafting_ms, 0.0)
            known = base_ms + depth * level_ms
        self._drafting_ms[depth] = nearer(known, drafting_ms)
        if draft.parents is not None:
            self._sizes[depth] = len(draft)
        beside_ms = max(0.0, verifying_ms - self._costs.verify(num_rows))
        self._beside_ms = nearer(self._beside_ms or beside_ms, beside_ms)

    def learn(self, draft: Draft, num_held: int) -> None:
        """So many levels of a draft that was verified held."""
        num_tried = min(num_held + 1, draft.levels)
        for level in range(MAX_GAMMA):
            # Of levels that nobody drafts any more what was seen fades too: they may hold by now.
            is_tried = level < num_tried
            self._tried[level] = _MEMORY * self._tried[level] + is_tried
            self._held[level] = _MEMORY * self._held[level] + (is_tried and level < num_held)

    def _token_ms(self) -> list[float]:
        """Of every depth, what a token takes."""
        base_ms, level_ms = self._line()
        found: list[float] = []
        rate, joint, num_tokens = _FIRST_RATE, 1.0, 1.0
        for level in range(self._deepest):
            tried, held = self._tried[level], self._held[level]
            rate = (held + rules.PRIOR * rate) / (tried + rules.PRIOR)
            joint *= rate
            num_tokens += joint
            depth = level + 1
            ms = base_ms + depth * level_ms + self._beside_ms
            ms += self._costs.verify(1 + self._size(depth))
            found.append(ms / num_tokens)
        return found

    def _size(self, depth: int) -> int:
        """Tokens of a draft so deep: of a tree no more than the next deeper one had that was seen,
        or the deepest."""
        if not self._sizes:
            return depth
        return self._sizes[min((d for d in self._sizes if d >= depth), default=max(self._sizes))]

    def _line(self) -> tuple[float, float]:
        """Drafting as so many milliseconds, and so many a level: a line through what was timed, or
        one through nothing where that says too little."""
        times = self._drafting_ms
        if len(times) > 1:
            level_ms, base_ms = statistics.linear_regression(list(times), list(times.values()))
            if level_ms >= 0.0 and base_ms >= 0.0:
                return base_ms, level_ms
        return 0.0, statistics.fmean(ms / depth for depth, ms in times.items())
