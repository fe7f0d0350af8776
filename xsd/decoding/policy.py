"""Whether to draft, how much of it, and how much of that to verify: only what pays.

A draft that holds saves the time of a token; drafting and verifying it cost time whether it holds
or not. The costs are measured once (``Engine.measure``); the chances come from the drafter's own
confidence, which is set right by what became of earlier drafts. A policy belongs to one strategy
and learns on from sample to sample. None of this can change what is said.

Whoever draws drafts at random must ask before each draw, never afterwards: dropping a token
because of what it turned out to be would change the distribution of what is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xsd.decoding.accept import Draft

_BINS = 10
_PRIOR = 4.0
"""So many drafts is the drafter's own word worth against what was seen."""
_MEMORY = 0.1
"""Weight of the newest value in a running mean."""
_LONGEST_REST = 64
_NOISE = 0.05
"""Share of a pass's time by which two measurements of it may differ."""
_TURNS = 16
"""So many chains and as many trees are drafted in turn at first; later, one draft in so many is a
chain in any case."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the verifier's passes on this machine, measured."""

    verify_ms: Sequence[float]
    """Of passes of 1, 2, ... rows behind a prompt; never falling."""
    prefill_ms: float
    """Plain decoding's, clock start to first token."""

    def verify(self, num_rows: int) -> float:
        return self.verify_ms[min(num_rows, len(self.verify_ms)) - 1]

    @property
    def step(self) -> float:
        return self.verify_ms[0]


def row_sizes(verify_ms: Sequence[float]) -> tuple[int, ...]:
    """Of how many rows a pass of 1, 2, ... rows is best made, given what such passes cost.

    More rows may cost less where they take another kernel: 4-bit weights of 22 rows are read
    slower than those of 32. Less than noise is no reason.
    """
    sizes = []
    for num_rows, ms in enumerate(verify_ms, start=1):
        best = min(range(num_rows, len(verify_ms) + 1), key=lambda size: verify_ms[size - 1])
        pays = verify_ms[best - 1] < (1.0 - _NOISE) * ms
        sizes.append(best if pays else num_rows)
    return tuple(sizes)


class Policy:
    """The fixed one: every draft asked for is made and verified."""

    asks_confidence = False
    """Whether drafts should say how probable they are."""

    def wants_gap(self) -> bool:
        """Whether the drafter should work during this prefill at all."""
        return True

    def gap_size(self, size: int) -> int:
        """How many of ``size`` drafts to verify after the prefill has confirmed one more."""
        return size

    def learn_gap(self, verified: int, accepted: int, prefill_ms: float, early: int) -> None:
        """What became of it; ``early`` tokens stood before decode began."""

    def depth(self, limit: int) -> int:
        """Drafts to ask for in this cycle, 0 for none."""
        return limit

    def branches(self) -> bool:
        """Whether the head should grow a tree in this cycle; asked of those that can."""
        return True

    def chance(self, confidence: float) -> float:
        """That a draft holds whose drafter is so sure of it."""
        return confidence

    def go_on(self, joint: float, num_drafted: int) -> bool:
        """Whether to draft behind a token that holds, with all before it, with chance ``joint``."""
        return True

    def select(self, draft: Draft) -> Draft:
        """What of it to verify."""
        return draft

    def learn(
        self, draft: Draft, path: Sequence[int], drafting_ms: float, verifying_ms: float
    ) -> None:
        """What became of a cycle: ``path`` held (see ``accept``); ``draft`` was verified."""


class Adaptive(Policy):
    """Verifies and drafts while a token is expected to cost less than by plain decoding."""

    asks_confidence = True

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._tried = [0.0] * (_BINS + 1)
        self._held = [0.0] * (_BINS + 1)
        self._mean = 0.7
        self._draft_ms = {False: 0.2 * costs.step, True: 0.2 * costs.step}
        """Of a level, of a chain or (true) of a tree."""
        self._grows_tree = False
        self._num_choices = 0
        self._branching = _Rest()
        self._token_ms = costs.step
        self._load = 1.0
        """How much slower the machine is now than when the costs were measured; the times above
        are those of then, so that they can be compared."""
        self._cycles, self._gaps = _Rest(), _Rest()
        self._gap_tried: list[float] = []
        self._gap_held: list[float] = []
        """Of the gap's drafts by position: verified, and held with all before (of late)."""

    def wants_gap(self) -> bool:
        return self._gaps.over()

    def gap_size(self, size: int) -> int:
        # Positions that were never tried are thought as good as the last that was.
        counts = zip(self._gap_held, self._gap_tried, strict=True)
        chances = [(held + 0.2) / (tried + 1.0) for held, tried in counts]
        chances += (chances[-1:] or [0.5]) * (size - len(chances))
        return self._best_size(chances[:size])

    def learn_gap(self, verified: int, accepted: int, prefill_ms: float, early: int) -> None:
        self._gap_tried += [0.0] * (verified - len(self._gap_tried))
        self._gap_held += [0.0] * (verified - len(self._gap_held))
        for k in range(verified):
            self._gap_tried[k] = 0.9 * self._gap_tried[k] + 1.0
            self._gap_held[k] = 0.9 * self._gap_held[k] + (k < accepted)
        spent = max(0.0, prefill_ms / self._load - self.costs.prefill_ms)
        spent += self.costs.verify(verified + 1) if verified else 0.0
        self._gaps.learn((early - 1) * self.costs.step - spent)

    def depth(self, limit: int) -> int:
        return limit if self._cycles.over() else 0

    def branches(self) -> bool:
        # What a level of either costs must be known, and must not grow old.
        self._num_choices += 1
        in_turn, is_chain = self._num_choices <= 2 * _TURNS, self._num_choices % _TURNS == 0
        if in_turn:
            self._grows_tree = self._num_choices % 2 == 0
        else:
            self._grows_tree = not is_chain and self._branching.over()
        return self._grows_tree

    def chance(self, confidence: float) -> float:
        bin_ = int(confidence * _BINS)
        return (self._held[bin_] + _PRIOR * confidence) / (self._tried[bin_] + _PRIOR)

    def go_on(self, joint: float, num_drafted: int) -> bool:
        costs = self.costs
        row_ms = costs.verify(num_drafted + 2) - costs.verify(num_drafted + 1)
        return joint * self._mean * self._token_ms > self._draft_ms[self._grows_tree] + row_ms

    def select(self, draft: Draft) -> Draft:
        if draft.confidence is None or draft.q is not None:
            return draft
        return draft.cut(self._best_size(joint_chances(draft, self)))

    def learn(
        self, draft: Draft, path: Sequence[int], drafting_ms: float, verifying_ms: float
    ) -> None:
        expected_ms = self._load * self.costs.verify(len(draft) + 1)
        self._load *= 1.05 if verifying_ms > expected_ms else 0.95
        if not draft.tokens:
            self._cycles.learn(-self._draft_ms[self._grows_tree])
            return
        for node, parent in enumerate(draft.parents or range(-1, len(draft) - 1)):
            if draft.confidence is None or not (parent == -1 or parent in path):
                continue
            bin_ = int(draft.confidence[node] * _BINS)
            self._tried[bin_] += 1.0
            self._held[bin_] += node in path
        depth = _depth(draft)
        # Follows the median: a machine that was busy for a moment is no slower for that.
        drafting_ms /= depth * self._load
        level_ms = self._draft_ms[self._grows_tree]
        self._draft_ms[self._grows_tree] = level_ms * (1.05 if drafting_ms > level_ms else 0.95)
        num_asked = len(path) + (len(path) < depth)
        self._mean += _MEMORY * (len(path) / num_asked - self._mean)
        spent = depth * self._draft_ms[self._grows_tree] + self.costs.verify(len(draft) + 1)
        said = len(path) + 1
        self._cycles.learn(said * self.costs.step - spent)
        token_ms = self._token_ms + _MEMORY * (spent / said - self._token_ms)
        self._token_ms = min(self.costs.step, token_ms)
        if self._grows_tree and draft.confidence is not None:
            self._branching.learn(self._gain_of_branching(draft, depth))

    def _gain_of_branching(self, draft: Draft, depth: int) -> float:
        """Milliseconds that a tree is worth more than its trunk, the chain of likeliest tokens."""
        joint = joint_chances(draft, self)
        trunk: list[float] = []
        node = -1
        while after := list(draft.children(node)):
            node = max(after, key=lambda i: joint[i])
            trunk.append(joint[node])
        rows_ms = self.costs.verify(len(draft) + 1) - self.costs.verify(len(trunk) + 1)
        levels_ms = depth * (self._draft_ms[True] - self._draft_ms[False])
        return (sum(joint) - sum(trunk)) * self._token_ms - rows_ms - levels_ms

    def _best_size(self, chances: Sequence[float]) -> int:
        """The number of drafts, likeliest first, whose tokens are worth the most more than their
        rows cost."""
        best, best_gain, worth = 0, 0.0, 0.0
        step = self.costs.step
        for size, chance in enumerate(chances, start=1):
            worth += chance * self._token_ms
            gain = worth - (self.costs.verify(size + 1) - step)
            if gain > best_gain:
                best, best_gain = size, gain
        return best


class _Rest:
    """Leaves off what has not paid of late, and tries it again after ever longer rests."""

    def __init__(self) -> None:
        self._gain = 0.0
        self._left = 0
        self._length = 2

    def over(self) -> bool:
        self._left -= self._left > 0
        return self._left == 0

    def learn(self, gain_ms: float) -> None:
        self._gain += 2 * _MEMORY * (gain_ms - self._gain)
        if self._gain < 0:
            self._left = self._length
            self._length = min(_LONGEST_REST, 2 * self._length)
            self._gain = min(0.0, gain_ms) / 2
        elif gain_ms > 0:
            self._length = 2


def joint_chances(draft: Draft, policy: Policy) -> list[float]:
    """Of every drafted token, that it holds with all before it."""
    assert draft.confidence is not None
    parents = draft.parents or range(-1, len(draft) - 1)
    joint: list[float] = []
    for parent, confidence in zip(parents, draft.confidence, strict=True):
        before = 1.0 if parent == -1 else joint[parent]
        joint.append(before * policy.chance(confidence))
    return joint


def _depth(draft: Draft) -> int:
    if draft.parents is None:
        return len(draft)
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 if parent == -1 else depths[parent] + 1)
    return max(depths)
