"""The policy drafts and verifies what pays, and leaves off what does not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from xsd.adapters import checkpoint
from xsd.decoding.accept import Draft
from xsd.decoding.draft import HeadDrafter, HeadOptions, VerifierTables
from xsd.decoding.policy import Adaptive, Costs, Policy, joint_chances, row_sizes
from xsd.pairs.base import ModelPair

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


LEVELS, SECOND = 4, 0.8
"""Depth of every draft; how often the second guess holds where the first does not."""


def grow(
    policy: Policy, costs: Costs, first: float, tree_ms: float, cycles: int = 800
) -> tuple[float, float]:
    """Milliseconds a token, and the share of trees, of a head whose best guess holds at ``first``.

    A level of a chain costs 0.1 ms, one of a tree ``tree_ms``.
    """
    chance = random.Random(0)
    spent = said = trees = 0.0
    for _ in range(cycles):
        grows = policy.branches()
        trees += grows
        # Every node of the trunk has a second guess beside it, which nothing follows.
        second = (1 - first) * SECOND
        parents, sure, parent = [], [], -1
        for _ in range(LEVELS):
            parents += [parent, parent] if grows else [parent]
            sure += [first, second] if grows else [first]
            parent = len(parents) - 1 - grows
        draft = Draft([1] * len(sure), parents if grows else None, None, sure)
        if grows:
            joint = joint_chances(draft, policy)
            best = sorted(range(len(sure)), key=lambda i: -joint[i])
            number = {-1: -1} | {node: i for i, node in enumerate(best)}
            parents, sure = [number[parents[i]] for i in best], [sure[i] for i in best]
            draft = Draft([1] * len(sure), parents, None, sure)
        draft = policy.select(draft)
        path: list[int] = []
        while True:
            after = list(draft.children(path[-1] if path else -1))
            held = chance.random()
            if after and held < first:
                path.append(after[0])
            elif len(after) > 1 and held < first + second:
                path.append(after[1])
            else:
                break
        drafting_ms = LEVELS * (tree_ms if grows else 0.1)
        policy.learn(draft, path, drafting_ms, costs.verify(len(draft) + 1))
        spent += drafting_ms + costs.verify(len(draft) + 1)
        said += len(path) + 1
    return spent / said, trees / cycles


class Chains(Adaptive):
    def branches(self) -> bool:
        self._grows_tree = False
        return False


class Trees(Adaptive):
    def branches(self) -> bool:
        self._grows_tree = True
        return True


FREE = Costs((1.0,) * 24, 10.0)
DEARER = Costs(tuple(1.0 + 0.3 * i for i in range(24)), 10.0)


@pytest.mark.parametrize(
    ("costs", "first", "tree_ms", "prefers_trees"),
    [
        (FREE, 0.5, 0.12, True),
        (CHEAP, 0.5, 0.12, True),
        (CHEAP, 0.5, 0.4, False),
        (DEARER, 0.7, 0.12, False),
        (CHEAP, 0.98, 0.2, False),
    ],
    ids=["free rows", "cheap rows", "dear trees", "dear rows", "sure head"],
)
def test_a_head_grows_trees_where_they_pay(
    costs: Costs, first: float, tree_ms: float, prefers_trees: bool
) -> None:
    ms, share = grow(Adaptive(costs), costs, first, tree_ms)
    chains_ms, _ = grow(Chains(costs), costs, first, tree_ms)
    trees_ms, _ = grow(Trees(costs), costs, first, tree_ms)
    assert (trees_ms < chains_ms) == prefers_trees
    assert share > 0.8 if prefers_trees else share < 0.2
    assert ms < 1.03 * min(chains_ms, trees_ms)


def test_the_fixed_policy_always_grows_trees() -> None:
    assert grow(Policy(), FREE, 0.5, 0.2, cycles=20)[1] == 1.0


@pytest.mark.parametrize("policy", [Chains, Trees])
def test_a_head_drafts_the_shape_it_is_told(
    policy: type[Adaptive], pair: ModelPair, adapters: dict[str, Path]
) -> None:
    adapter, _ = checkpoint.load(adapters["E1"])
    options = HeadOptions(tree_width=3)
    head = HeadDrafter(adapter.eval(), VerifierTables.of(pair.verifier), 30, options, policy(FREE))
    head.begin("?", None, None)
    draft = head.propose([5], torch.randn(1, pair.verifier.width), 4)
    assert (draft.parents is None) == (policy is Chains) and draft.tokens


def test_a_good_drafter_is_used_in_full() -> None:
    assert live(Adaptive(CHEAP), CHEAP, 0.95, 0.95) < 0.55


def test_confidence_is_set_right() -> None:
    policy = Adaptive(CHEAP)
    for _ in range(50):
        policy.learn(Draft([1], confidence=[0.95]), [], 0.1, 1.0)
    assert policy.chance(0.95) < 0.1
    assert policy.chance(0.35) == pytest.approx(0.35)


def test_drawn_drafts_are_never_dropped_afterwards() -> None:
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
