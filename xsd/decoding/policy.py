"""Whether to draft, how much of it, and how much of that to verify: only what pays.

A draft that holds saves the time of a token; drafting and verifying it cost time whether it holds
or not. The costs are measured once (``measure_passes``); the chances come from the drafter's own
confidence, which is set right by what became of earlier drafts. What a cycle does follows from
numbers (``kernels.rule``) that Python and compiled cycles share. Whether to draft in an answer at
all follows from what answers took with drafts and without. A policy belongs to one strategy and
learns on from sample to sample. None of this can change what is said.

Whoever draws drafts at random must ask before each draw, never afterwards: dropping a token
because of what it turned out to be would change the distribution of what is said.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import numpy as np

from xsd.decoding.accept import Draft
from xsd.decoding.costs import NOISE, Costs, nearer
from xsd.decoding.decoded import Decoded
from xsd.decoding.depth import Depths
from xsd.kernels import rule as rules

_TRIALS, _ENOUGH = 3, 12
"""Answers in a way before it is judged: if they tell clearly what it is worth, and if not."""
_RECENT = 25
"""Answers in a way that are remembered."""
_SHORTEST_REST, _LONGEST_REST = 8, 128
"""Answers between two trials of a way that has lost."""
_LONG = 32
"""Cycles of rest that make up for an answer, in which then nobody need draft."""

Way = Literal["plain", "head", "all"]
"""What of a strategy an answer makes use of: nothing, its head alone, all of it."""
Rule = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""See ``kernels.rule``."""


class Policy:
    """The fixed one: every draft asked for is made and verified."""

    asks_confidence = False
    """Whether drafts should say how probable they are."""
    rule: Rule = (np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0))
    """What compiled cycles go by."""

    def way(self, ways: Sequence[Way]) -> Way:
        """Which of the ways to answer the next one in; the last has all the strategy's parts."""
        return ways[-1]

    def learn_answer(self, way: Way, answer: Decoded) -> None:
        """What an answer took in that way."""

    def gap_size(self, draft: Draft) -> int:
        """How many of the gap's further drafts to verify, the prefill having confirmed its first.
        They are a chain of chosen tokens, so how sure their drafter is may decide: it knows nothing
        of what the verifier will draw."""
        return len(draft)

    def learn_gap(self, draft: Draft, held: int) -> None:
        """Of all the gap's drafts so many equal what was said, before the first that does not."""

    def learn_drafting(self, first_ms: float, level_ms: float) -> None:
        """What drafting costs: a cycle's first level, and each further one."""

    @property
    def drafting_ms(self) -> tuple[float, float] | None:
        """The same as it is thought to be now; None: nobody follows it."""
        return None

    def depth(self, limit: int) -> int:
        """Drafts to ask for in this cycle, 0 for none."""
        return limit

    def whole_depth(self, limit: int) -> int:
        """The same where a draft is made whole before anybody looks at it."""
        return limit

    def rest(self) -> int:
        """How many cycles after one without drafts go without them too."""
        return 0

    def rested(self, num_cycles: int) -> None:
        """So many of those went by."""

    def chance(self, confidence: float) -> float:
        """That a draft holds whose drafter is so sure of it."""
        return confidence

    def go_on(self, joint: float, size: int) -> bool:
        """Whether to draft behind a token that holds, with all before it, with chance ``joint``;
        so many drafts are as likely or likelier."""
        return True

    def select(self, draft: Draft) -> Draft:
        """What of it to verify. Whether a drawn token is among it must not depend on what it turned
        out to be: what is said would no longer follow the verifier."""
        return draft

    def learn(self, draft: Draft, path: Sequence[int]) -> None:
        """What became of a cycle: ``path`` held (see ``accept``); ``draft`` was verified."""

    def time(self, draft: Draft, drafting_ms: float, verifying_ms: float) -> None:
        """What it took, before ``learn`` is told of it; not of a cycle in which something was done
        that need not be done again."""


class Adaptive(Policy):
    """Verifies and drafts while a token is expected to cost less than by plain decoding."""

    asks_confidence = True

    def __init__(self, costs: Costs, *, is_timed: bool = False) -> None:
        """``is_timed``: drafting slows what these costs know nothing of, such as a prefill that a
        drafter runs beside, or cycles that leave the compiled loop: judge it by what whole answers
        take."""
        self.costs, self._is_timed = costs, is_timed
        pace = np.zeros(7)
        pace[rules.TOKEN_MS], pace[rules.MEAN] = costs.step, 0.7
        # Thought to cost nothing until it has been timed: the first to do so says what it costs.
        pace[rules.FIRST_MS] = costs.cycle_ms
        pace[rules.LENGTH] = rules.SHORTEST_REST
        seen = np.zeros((2, rules.NUM_BUCKETS))
        self.rule = (seen[0].copy(), seen[1].copy(), np.array(costs.verify_ms, float), pace)
        self._load = 1.0
        """How much slower the machine is now than when the costs were measured; the times above
        are those of then, so that they can be compared."""
        self._is_cold = True
        """Nobody has drafted in this answer, or since a rest: that takes several times as long as
        the next draft will, and whoever judged by it would draft ever more rarely."""
        self._ways: dict[Way, _Tried] = {}
        self._best: Way = "plain"
        self._gap = _GapChances()
        self._depths = Depths(costs)
        self._is_whole = False
        """Whether drafts are made whole, as deep as ``Depths`` chooses."""

    def way(self, ways: Sequence[Way]) -> Way:
        self._is_cold = True
        if ways[0] == "plain" and self.rule[3][rules.LEFT] >= _LONG:
            return "plain"
        if not self._is_timed:
            return ways[-1]
        for way in ways:
            self._ways.setdefault(way, _Tried())
        tried = {way: self._ways[way] for way in ways}
        plain_ms = tried["plain"].middle if "plain" in tried else None
        open_ = [way for way in reversed(ways) if not tried[way].is_judged(plain_ms)]
        if open_:
            # In turn, the whole strategy before its parts.
            return min(open_, key=lambda way: len(tried[way].times))
        # What is in use, plain decoding too, has to lose by more than noise to be left off.
        best = min(ways, key=lambda way: self._price(way) / (1.0 + NOISE * (way == self._best)))
        tried[best].is_best()
        self._best = best
        return next((way for way in ways if way != best and tried[way].is_due()), best)

    def _price(self, way: Way) -> float:
        return self._ways[way].middle if way == "plain" else self._ways[way].price

    def learn_answer(self, way: Way, answer: Decoded) -> None:
        num_tokens = len(answer.token_ids)
        if way == "plain":
            self.rested(num_tokens - 1)
        if not self._is_timed or num_tokens < 2 or answer.made_captures:
            return
        tried = self._ways.setdefault(way, _Tried())
        is_whole = self._is_whole and bool(answer.cycle_drafted)
        if is_whole and self._depths.chosen not in tried.depths:
            # What answers took with drafts of another depth says nothing of these.
            tried.depths.add(self._depths.chosen)
            tried.times.clear()
            return
        tried.times.append(answer.total_ms / self.costs.plain_ms(num_tokens))

    def gap_size(self, draft: Draft) -> int:
        return self._best_size(self._gap.joint(draft, 1))

    def learn_gap(self, draft: Draft, held: int) -> None:
        self._gap.learn(draft, held)

    def learn_drafting(self, first_ms: float, level_ms: float) -> None:
        pace = self.rule[3]
        pace[rules.FIRST_MS], pace[rules.LEVEL_MS] = first_ms, level_ms
        self._depths.learn_drafting(first_ms, level_ms)

    @property
    def drafting_ms(self) -> tuple[float, float]:
        pace = self.rule[3]
        return float(pace[rules.FIRST_MS]), float(pace[rules.LEVEL_MS])

    def depth(self, limit: int) -> int:
        return limit if rules.may_draft(self.rule) else 0

    def whole_depth(self, limit: int) -> int:
        self._is_whole = True
        return self._depths.best(limit)

    def rest(self) -> int:
        # The cycle that begins when none is left may draft again.
        return max(0, int(self.rule[3][rules.LEFT]) - 1)

    def rested(self, num_cycles: int) -> None:
        pace = self.rule[3]
        self._is_cold = self._is_cold or num_cycles > 0
        pace[rules.LEFT] = max(0.0, pace[rules.LEFT] - num_cycles)

    def chance(self, confidence: float) -> float:
        return float(rules.chance(self.rule, confidence))

    def go_on(self, joint: float, size: int) -> bool:
        return bool(rules.goes_on(self.rule, joint, size))

    def select(self, draft: Draft) -> Draft:
        if draft.q is not None:
            return draft
        return draft.cut(self._best_size(joint_chances(self._told(draft), self)))

    def learn(self, draft: Draft, path: Sequence[int]) -> None:
        told = _as_arrays(self._told(draft))
        rules.learn(self.rule, *told, np.array(path, np.int64), max(1, draft.depth))
        self._depths.learn(draft, len(path))

    def time(self, draft: Draft, drafting_ms: float, verifying_ms: float) -> None:
        # Follows what drafting costs by now, and how busy the machine is.
        pace = self.rule[3]
        was_cold, self._is_cold = self._is_cold, False
        known_ms = pace[rules.LEVEL_MS] * max(1, draft.depth) * self._load
        # A cold one that takes less says enough: who rests after every draft has no other.
        if was_cold and drafting_ms >= known_ms:
            return
        self._depths.time(draft, drafting_ms, verifying_ms)
        # The costs are those of a machine with nothing else to do. A pass that takes less was begun
        # while the device still drafted, which makes drafting no dearer.
        load = verifying_ms / self.costs.verify(len(draft) + 1)
        self._load = max(1.0, nearer(self._load, load))
        level_ms = drafting_ms / max(1, draft.depth) / self._load
        pace[rules.LEVEL_MS] = nearer(float(pace[rules.LEVEL_MS]) or level_ms, level_ms)
        pace[rules.FIRST_MS] = pace[rules.LEVEL_MS] + self.costs.cycle_ms

    def _told(self, draft: Draft) -> Draft:
        """A draft whose drafter says nothing of its chances is as good as its others were."""
        if draft.confidence is not None:
            return draft
        return replace(draft, confidence=[float(self.rule[3][rules.MEAN])] * len(draft))

    def _best_size(self, chances: Sequence[float]) -> int:
        return int(rules.best_size(self.rule, np.array(chances, float)))


class _GapChances:
    """How often drafts of the gap hold, by what their drafter says of them, or by position where it
    says nothing."""

    def __init__(self) -> None:
        self._tried: Counter[int] = Counter()
        self._held: Counter[int] = Counter()

    def joint(self, draft: Draft, first: int) -> list[float]:
        """Of drafts from position ``first`` on: that one holds with all before it."""
        each = (
            (self._held[kind] + rules.PRIOR * sure) / (self._tried[kind] + rules.PRIOR)
            for kind, sure in self._kinds(draft, first)
        )
        return list(accumulate(each, operator.mul))

    def learn(self, draft: Draft, held: int) -> None:
        """The first ``held`` of all drafts were right, and the next was not."""
        for number, (kind, _) in enumerate(self._kinds(draft, 0)[: held + 1]):
            self._tried[kind] += 1
            self._held[kind] += number < held

    def _kinds(self, draft: Draft, first: int) -> list[tuple[int, float]]:
        """What every draft is counted among, and what it is thought to hold with at first."""
        if draft.confidence is None:
            return [(-1 - first - k, 0.5) for k in range(len(draft))]
        return [(int(rules.bucket(sure)), sure) for sure in draft.confidence]


class _Tried:
    """A way to answer: what it took of late, over what plain decoding is expected to take."""

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=_RECENT)
        self.depths = {0}
        """Those of its drafts so far, see ``Depths.chosen``."""
        self._left = self._length = _SHORTEST_REST

    @property
    def middle(self) -> float:
        """The median: a machine that was busy for a moment is no slower for that."""
        return statistics.median(self.times) if self.times else math.inf

    @property
    def scatter(self) -> float:
        """The median distance from the median."""
        middle = self.middle
        return statistics.median(abs(time - middle) for time in self.times)

    @property
    def price(self) -> float:
        """What plain decoding must take, at least, for this to be worth it: a clock must see the
        gain, and of six answers hardly more than one be slower than plain ones."""
        seen = self.middle * (1.0 + NOISE)
        if len(self.times) < _ENOUGH:
            return seen
        # A standard deviation of times that scatter by chance.
        return max(seen, self.middle + 1.48 * self.scatter)

    def is_judged(self, plain: float | None) -> bool:
        """Whether enough is known of it to say that it pays, or does not."""
        num_times = len(self.times)
        if num_times < _TRIALS or plain is None or num_times >= _ENOUGH:
            return num_times >= _TRIALS
        # Of a median, if times scatter by chance.
        error = 1.86 * self.scatter / math.sqrt(num_times)
        return abs(self.price - plain) > 2.0 * error

    def is_best(self) -> None:
        self._left = self._length = _SHORTEST_REST

    def is_due(self) -> bool:
        """Whether to try it again, after ever longer rests."""
        self._left -= 1
        if self._left:
            return False
        self._left = self._length = min(_LONGEST_REST, 2 * self._length)
        # What it took long ago must not outvote what it takes now.
        for _ in range(len(self.times) // 2):
            self.times.popleft()
        return True


def joint_chances(draft: Draft, policy: Policy) -> list[float]:
    """Of every drafted token, that it holds with all before it."""
    found: list[float] = rules.joint_chances(policy.rule, *_as_arrays(draft)).tolist()
    return found


def _as_arrays(draft: Draft) -> tuple[np.ndarray, np.ndarray]:
    """Parents and confidence, as the rule takes them."""
    parents = np.arange(-1, len(draft) - 1) if draft.parents is None else draft.parents
    return np.asarray(parents, np.int64), np.array(draft.confidence, float)
