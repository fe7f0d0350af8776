"""The policy drafts and verifies what pays, and leaves off what does not."""

from __future__ import annotations

import random

import pytest

from xsd.decoding.accept import Draft
from xsd.decoding.policy import Adaptive, Costs, Policy, joint_chances, row_sizes

CHEAP = Costs(tuple(1.0 + 0.05 * i for i in range(24)), 10.0)
DEAR = Costs(tuple(1.0 + 2.0 * i for i in range(24)), 10.0)


def live(policy: Policy, costs: Costs, rate: float, sure: float, cycles: int = 400) -> float:
    """Time of a run over the same tokens plainly, of drafts that hold at ``rate``."""
    chance = random.Random(0)
    spent = said = 0.0
    for _ in range(cycles):
        depth = policy.depth(4)
        drafted: list[float] = []
        joint = 1.0
        while len(drafted) < depth:
            drafted.append(sure)
            joint *= policy.chance(sure)
            if not policy.go_on(joint, len(drafted)):
                break
        draft = Draft([1] * len(drafted), confidence=drafted)
        drafting_ms = 0.2 * len(drafted)
        draft = policy.select(draft)
        path: list[int] = []
        while len(path) < len(draft) and chance.random() < rate:
            path.append(len(path))
        if drafting_ms:
            policy.learn(draft, path, 3 * drafting_ms, 3 * costs.verify(len(draft) + 1))
        spent += drafting_ms + costs.verify(len(draft) + 1)
        said += len(path) + 1
    return spent / (said * costs.step)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap rows", "dear rows"])
def test_never_much_worse_than_plain_nor_than_fixed(costs: Costs, rate: float) -> None:
    """Whatever the drafter says of itself, on a machine busier than when it was measured."""
    for sure in (0.2, 0.9):
        adaptive = live(Adaptive(costs), costs, rate, sure)
        assert adaptive < 1.05
        assert adaptive < 1.05 * live(Policy(), costs, rate, sure)


def test_a_good_drafter_is_used_in_full() -> None:
    assert live(Adaptive(CHEAP), CHEAP, 0.95, 0.95) < 0.55


def test_confidence_is_set_right() -> None:
    policy = Adaptive(CHEAP)
    for _ in range(50):
        policy.learn(Draft([1], confidence=[0.95]), [], 0.1, 1.0)
    assert policy.chance(0.95) < 0.1
    assert policy.chance(0.35) == pytest.approx(0.35)


def test_drawn_drafts_are_never_dropped_afterwards() -> None:
    import torch

    drawn = Draft([1, 2], None, torch.eye(3)[1:], [0.0, 0.0])
    assert Adaptive(DEAR).select(drawn) is drawn
    assert len(Adaptive(DEAR).select(Draft([1, 2], confidence=[0.0, 0.0]))) == 0


def test_a_tree_is_cut_to_its_likeliest_nodes() -> None:
    tree = Draft([1, 2, 3, 4], [-1, -1, 0, 1], None, [0.9, 0.1, 0.8, 0.5])
    assert joint_chances(tree, Policy()) == pytest.approx([0.9, 0.1, 0.72, 0.05])
    kept = Adaptive(Costs((1.0, 1.2, 1.4, 1.6, 1.8), 10.0)).select(tree)
    assert kept.tokens == [1, 2, 3]


def test_a_gap_that_does_not_pay_is_left() -> None:
    policy = Adaptive(CHEAP)
    used = 0
    for _ in range(200):
        if policy.wants_gap():
            used += 1
            policy.learn_gap(policy.gap_size(10), 0, prefill_ms=13.0, early=1)
    assert used < 12
    good = Adaptive(CHEAP)
    for _ in range(20):
        assert good.wants_gap()
        good.learn_gap(10, 8, prefill_ms=10.5, early=10)
    assert 8 <= good.gap_size(10) <= 9


def test_passes_get_the_rows_that_cost_least() -> None:
    # 4-bit weights: slow from two rows on, until at seven another kernel takes over.
    assert row_sizes((28.0, 50.0, 52.0, 68.0, 68.0, 68.0, 41.0, 43.0)) == (1, 7, 7, 7, 7, 7, 7, 8)
    # Two valleys: the cheaper one is worth the longer way.
    assert row_sizes((1.0, 5.0, 3.0, 5.0, 2.0)) == (1, 5, 5, 5, 5)
    # What may be noise is none of our business, nor is what always rises.
    assert row_sizes((10.0, 10.2, 9.9, 10.4)) == (1, 2, 3, 4)
    assert row_sizes((1.0, 2.0, 3.0)) == (1, 2, 3)
