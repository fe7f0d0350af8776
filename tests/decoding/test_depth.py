"""How deep to draft where all of a draft is made before anybody looks at it."""

from __future__ import annotations

import random

import pytest

from xsd.decoding.accept import Draft
from xsd.decoding.costs import Costs
from xsd.decoding.decoded import Decoded
from xsd.decoding.depth import Depths
from xsd.decoding.policy import Adaptive, Policy, Way

LIMIT = 8
STEP_MS, ROW_MS = 0.4, 0.01
COSTS = Costs([STEP_MS + ROW_MS * rows for rows in range(64)], 2.0)


class Machine:
    """What drafting takes, and how often each next draft holds."""

    def __init__(self, rate: float, base_ms: float, level_ms: float, beside_ms: float = 0.0):
        self.rate, self.base_ms, self.level_ms, self.beside_ms = rate, base_ms, level_ms, beside_ms
        self.deep_rate = rate
        """Of all levels but the first two."""
        self._random = random.Random(0)

    def cycles(self, depths: Depths, count: int = 400) -> int:
        """So many of them; the depth that they have led to."""
        for _ in range(count):
            depth = depths.best(LIMIT)
            draft = Draft(list(range(depth)))
            spent = self.base_ms + depth * self.level_ms, COSTS.verify(depth + 1) + self.beside_ms
            depths.time(draft, *(ms * self._random.uniform(0.98, 1.02) for ms in spent))
            depths.learn(draft, self._num_held(depth))
        return depths.best(LIMIT)

    def token_ms(self, depth: int) -> float:
        ms = self.base_ms + depth * self.level_ms + COSTS.verify(depth + 1) + self.beside_ms
        return ms / sum(self.rate**level for level in range(depth + 1))

    def _num_held(self, depth: int) -> int:
        rates = [self.rate] * 2 + [self.deep_rate] * LIMIT
        return next((i for i in range(depth) if self._random.random() >= rates[i]), depth)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75, 0.95])
@pytest.mark.parametrize(
    ("base_ms", "level_ms"), [(0.0, 0.02), (0.05, 0.1), (0.3, 0.1), (0.0, 0.3)]
)
@pytest.mark.parametrize("beside_ms", [0.0, 0.3])
def test_a_token_takes_nearly_the_least_it_can(
    rate: float, base_ms: float, level_ms: float, beside_ms: float
) -> None:
    machine = Machine(rate, base_ms, level_ms, beside_ms)
    chosen = machine.cycles(Depths(COSTS))
    least = min(map(machine.token_ms, range(1, LIMIT + 1)))
    assert machine.token_ms(chosen) < 1.1 * least


def test_it_follows_what_drafts_are_worth() -> None:
    depths = Depths(COSTS)
    assert depths.best(LIMIT) == LIMIT
    assert Machine(0.95, 0.05, 0.05).cycles(depths) == LIMIT
    assert Machine(0.2, 0.05, 0.05).cycles(depths) <= 2
    assert Machine(0.95, 0.05, 0.05).cycles(depths) >= LIMIT - 1


def test_levels_that_nobody_drafts_are_tried_again() -> None:
    depths, machine = Depths(COSTS), Machine(0.9, 0.05, 0.08)
    machine.deep_rate = 0.05
    assert machine.cycles(depths) <= 3
    machine.deep_rate = 0.95
    assert machine.cycles(depths) >= 6


def test_it_stays_within_the_limit() -> None:
    depths = Depths(COSTS)
    Machine(0.95, 0.05, 0.05).cycles(depths)
    assert [depths.best(limit) for limit in (1, 3, LIMIT)] == [1, 3, LIMIT]


def test_levels_of_a_tree_hold_whoever_of_them_does() -> None:
    tree = Draft([5, 6, 7, 8], parents=[-1, -1, 1, 1], num_levels=3)
    assert (tree.levels, tree.depth) == (2, 3)
    depths = Depths(COSTS)
    for _ in range(100):
        depths.time(tree, 0.1, 0.5)
        depths.learn(tree, 2)
    assert depths.best(LIMIT) == LIMIT
    for _ in range(300):
        depths.learn(tree, 1)
    assert depths.best(LIMIT) < LIMIT


def test_only_the_adaptive_policy_asks() -> None:
    adaptive = Adaptive(COSTS)
    for policy in (adaptive, Policy()):
        for _ in range(100):
            draft = Draft(list(range(LIMIT)), confidence=[0.5] * LIMIT)
            policy.time(draft, 2.0, 0.5)
            policy.learn(draft, [])
    assert adaptive.whole_depth(LIMIT) == 1
    assert Policy().whole_depth(LIMIT) == LIMIT


def way_after(policy: Policy, plain: Decoded, drafted: Decoded) -> Way:
    """The way of the next answer, behind 20 that took so long in their ways."""
    ways: list[Way] = ["plain", "all"]
    for _ in range(20):
        way = policy.way(ways)
        policy.learn_answer(way, plain if way == "plain" else drafted)
    return policy.way(ways)


def test_answers_with_drafts_of_another_depth_do_not_count() -> None:
    """Deep drafts lost; what is drafted now is less deep, and wins."""
    policy = Adaptive(COSTS, is_timed=True)
    plain = Decoded([0] * 61, total_ms=30.0)
    slow, fast = (Decoded([0] * 61, total_ms=ms, cycle_drafted=[1]) for ms in (40.0, 20.0))
    assert way_after(policy, plain, slow) == "plain"
    draft = Draft(list(range(LIMIT)), confidence=[0.5] * LIMIT)
    for _ in range(100):
        policy.time(draft, 4.0, 0.5)
        policy.learn(draft, [0])
    assert policy.whole_depth(LIMIT) < LIMIT
    assert way_after(policy, plain, fast) == "all"


def test_answers_whose_drafts_were_as_deep_as_paid_count_whatever_depth_is_chosen() -> None:
    policy = Adaptive(COSTS, is_timed=True)
    for _ in range(5):
        policy.learn_answer("all", Decoded([0] * 61, total_ms=20.0))
    draft = Draft(list(range(LIMIT)), confidence=[0.5] * LIMIT)
    for _ in range(100):
        policy.time(draft, 4.0, 0.5)
        policy.learn(draft, [0])
    assert policy.whole_depth(LIMIT) < LIMIT
    for _ in range(3):
        policy.learn_answer("plain", Decoded([0] * 61, total_ms=30.0))
        policy.learn_answer("all", Decoded([0] * 61, total_ms=20.0))
    assert len(policy._ways["all"].times) == 8


def test_drafting_that_was_measured_needs_no_trial() -> None:
    depths = Depths(COSTS)
    depths.learn_drafting(0.1, 1.0)
    assert depths.best(LIMIT) == 1
    depths.learn_drafting(0.1, 0.0)
    assert depths.best(LIMIT) == LIMIT


def test_a_shallow_tree_says_nothing_of_deeper_ones() -> None:
    """An answer's last trees have less room than others."""
    costs = Costs(tuple(1.0 + 0.5 * row for row in range(24)), 1.0)
    depths = Depths(costs)
    large = Draft(list(range(10)), [-1, *range(7), 0, 1], num_levels=LIMIT)
    small = Draft([1, 2, 3], [-1, -1, -1], num_levels=1)
    depths.best(LIMIT)
    for draft, verify_ms in ((large, costs.verify(11)), (small, costs.verify(4))):
        depths.time(draft, 1.0, verify_ms)
    passes = [ms * tokens for ms, tokens in zip(depths._token_ms(), tokens_at_first(), strict=True)]
    # Whatever drafting takes, a level more takes more of it.
    assert passes[0] < costs.verify(4) + 1.5
    assert all(ms > costs.verify(11) for ms in passes[1:])


def tokens_at_first() -> list[float]:
    """Of drafts of 1 to ``LIMIT`` levels of which nobody has seen any."""
    return [1.0 + sum(0.7**level for level in range(1, depth + 1)) for depth in range(1, LIMIT + 1)]
