"""The policy drafts and verifies what pays, and leaves off what does not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from xsd.adapters import checkpoint
from xsd.decoding.accept import Draft
from xsd.decoding.costs import Costs, row_sizes
from xsd.decoding.decoded import Decoded
from xsd.decoding.draft import HeadDrafter, HeadOptions
from xsd.decoding.policy import Adaptive, Policy, Way, joint_chances
from xsd.decoding.tables import VerifierTables
from xsd.kernels import rule as rules
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
        draft = Draft([1] * len(drafted), confidence=drafted, num_levels=len(drafted))
        drafting_ms = 0.2 * len(drafted)
        draft = policy.select(draft)
        path: list[int] = []
        while len(path) < len(draft) and chance.random() < rate:
            path.append(len(path))
        if drafting_ms:
            policy.time(draft, 3 * drafting_ms, 3 * costs.verify(len(draft) + 1))
            policy.learn(draft, path)
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


def grow(policy: Policy, costs: Costs, first: float, branches: bool, cycles: int = 1500) -> float:
    """Milliseconds a token of a head whose best guess holds at ``first``; a level costs 0.1 ms.

    A tree has a second guess beside every node of its trunk, which nothing follows.
    """
    policy.learn_drafting(0.1, 0.1)
    chance = random.Random(0)
    spent = said = 0.0
    for _ in range(cycles):
        second = (1 - first) * SECOND
        parents, sure, parent, depth = [], [], -1, 0
        while depth < LEVELS:
            depth += 1
            trunk = len(parents)
            parents += [parent, parent] if branches else [parent]
            sure += [first, second] if branches else [first]
            joint = joint_chances(Draft([1] * len(sure), parents, None, sure), policy)
            parent = trunk
            if not policy.go_on(joint[trunk], sum(j >= joint[trunk] for j in joint)):
                break
        best = sorted(range(len(sure)), key=lambda i: -joint[i])
        number = {-1: -1} | {node: i for i, node in enumerate(best)}
        parents, sure = [number[parents[i]] for i in best], [sure[i] for i in best]
        draft = policy.select(Draft([1] * len(sure), parents, None, sure, depth))
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
        # The first level costs what every other does, and the clock says so.
        policy.time(draft, 0.1 * depth, costs.verify(len(draft) + 1))
        policy.learn(draft, path)
        spent += 0.1 * depth + costs.verify(len(draft) + 1)
        said += len(path) + 1
    return spent / said


FREE = Costs((1.0,) * 24, 10.0)
DEARER = Costs(tuple(1.0 + 0.3 * i for i in range(24)), 10.0)


@pytest.mark.parametrize("first", [0.5, 0.7, 0.98])
@pytest.mark.parametrize("costs", [FREE, CHEAP, DEARER], ids=["free rows", "cheap", "dear"])
def test_a_tree_never_loses_to_a_chain(costs: Costs, first: float) -> None:
    """Where rows are free it gains; where they are dear it is cut to what a chain would be."""
    tree, chain = (grow(Adaptive(costs), costs, first, branches) for branches in (True, False))
    assert tree < 1.03 * chain
    if costs is FREE and first < 0.9:
        assert tree < 0.95 * chain
    assert tree < 1.03 * grow(Policy(), costs, first, True)


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("width", [0, 2, 3])
@pytest.mark.parametrize("level", ["B1", "E1", "E3", "text"])
@pytest.mark.parametrize("costs", [FREE, CHEAP, DEARER, None], ids=["free", "cheap", "dear", "-"])
def test_compiled_drafts_are_those_of_python(
    costs: Costs | None,
    level: str,
    width: int,
    pair: ModelPair,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rule, two places that go by it: the same tokens, parents and depth."""
    if level == "B1" and width:
        pytest.skip("it reads no tokens: all branches are one")
    adapter, _ = checkpoint.load(adapters[level])
    policy = Policy() if costs is None else Adaptive(costs)
    if costs is not None:
        # Random weights are sure of nothing: let what they draft be thought to hold.
        policy.rule[0][:], policy.rule[1][:] = 100.0, torch.linspace(60.0, 90.0, 16).numpy()
        policy.learn_drafting(0.3, 0.3)
    options = HeadOptions(tree_width=width, tree_nodes=7)
    heads = [
        HeadDrafter(adapter.eval(), VerifierTables.of(pair.verifier), 30, options, policy)
        for _ in range(2)
    ]
    monkeypatch.setattr(heads[1], "vocabulary", None)
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(9, pair.verifier.width, generator=generator)
    depths = set()
    for head in heads:
        head.begin("?", visual, None)
    for _ in range(20):
        ids = torch.randint(1000, (6,), generator=generator).tolist()
        states = torch.randn(6, pair.verifier.width, generator=generator)
        # What has been read stays; a cycle brings new rows.
        for size, new in ((3, 3), (6, 3)):
            compiled, plain = (
                head.propose(ids[:size], states[size - new : size], 5) for head in heads
            )
            assert compiled.tokens == plain.tokens
            assert (compiled.parents, compiled.depth) == (plain.parents, plain.depth)
            if plain.confidence is not None:
                assert compiled.confidence == pytest.approx(plain.confidence, rel=1e-4)
            assert policy.select(compiled).tokens == policy.select(plain).tokens
            depths.add(plain.depth)
    assert max(depths) == 5 if costs is None else max(depths) < 5


def test_a_good_drafter_is_used_in_full() -> None:
    assert live(Adaptive(CHEAP), CHEAP, 0.95, 0.95) < 0.55


def test_what_drafting_costs_is_learnt_warm() -> None:
    """The first draft of an answer finds cold caches; the second is what the rest will cost."""
    policy = Adaptive(CHEAP)
    draft = Draft([1], confidence=[0.9])
    for _ in range(30):
        policy.way(["all"])
        policy.time(draft, 50.0, 20.0)
        policy.learn(draft, [0])
        policy.time(draft, 0.1, CHEAP.verify(2))
        policy.learn(draft, [0])
    assert policy.drafting_ms == pytest.approx((0.1, 0.1), rel=0.25)


@pytest.mark.parametrize("measured", [None, (30.0, 5.0)])
def test_who_was_thought_too_dear_is_found_to_pay(measured: tuple[float, float] | None) -> None:
    """Though every draft is the first after a rest, for each is thought to lose."""
    policy, draft = Adaptive(CHEAP), Draft([1, 2], confidence=[0.9, 0.9])
    policy.way(["all"])
    if measured is None:
        # A machine that was busy for a moment, when it was to say what drafting costs.
        policy.time(draft, 0.1, CHEAP.verify(3))
        policy.time(draft, 9.0, CHEAP.verify(3))
    else:
        policy.learn_drafting(*measured)
    num_drafted = 0
    for _ in range(20_000):
        if policy.depth(2):
            policy.time(draft, 0.2, CHEAP.verify(3))
            policy.learn(draft, [0, 1])
            num_drafted += 1
        else:
            policy.rested(policy.rest())
    assert num_drafted > 10_000


def test_confidence_is_set_right() -> None:
    policy = Adaptive(CHEAP)
    for _ in range(50):
        policy.time(Draft([1], confidence=[0.95]), 0.1, 1.0)
        policy.learn(Draft([1], confidence=[0.95]), [])
    assert policy.chance(0.95) < 0.1
    assert policy.chance(0.35) == pytest.approx(0.35)


def test_drawn_drafts_are_never_dropped_afterwards() -> None:
    drawn = Draft([1, 2], None, torch.eye(3)[1:], [0.0, 0.0])
    assert Adaptive(DEAR).select(drawn) is drawn
    assert Policy().select(drawn) is drawn


def test_a_tree_is_cut_to_its_likeliest_nodes() -> None:
    tree = Draft([1, 2, 3, 4], [-1, -1, 0, 1], None, [0.9, 0.1, 0.8, 0.5])
    assert joint_chances(tree, Policy()) == pytest.approx([0.9, 0.1, 0.72, 0.05])
    kept = Adaptive(Costs((1.0, 1.2, 1.4, 1.6, 1.8), 10.0)).select(tree)
    assert kept.tokens == [1, 2, 3]


def answers(policy: Policy, all_ms: float, load: float = 1.0, count: int = 400) -> float:
    """Share of answers in which the drafter worked, if its prefill then takes ``all_ms``."""
    busy = random.Random(0)
    used = 0
    for _ in range(count):
        way = policy.way(["plain", "all"])
        used += way == "all"
        slower = busy.uniform(1.0, load)
        prefill_ms = slower * (all_ms if way == "all" else 10.0)
        answer = Decoded(list(range(21)), prefill_ms, prefill_ms + slower * 20 * CHEAP.step)
        policy.learn_answer(way, answer)
    return used / count


@pytest.mark.parametrize("load", [1.0, 1.1])
def test_a_drafter_that_does_not_pay_is_left_off(load: float) -> None:
    """On a machine that is up to a tenth slower from one answer to the next, too."""
    assert answers(Adaptive(CHEAP, is_timed=True), 13.0, load) < 0.05
    assert answers(Adaptive(CHEAP, is_timed=True), 6.0, load) > 0.95
    # A gain of a hundredth scatters more than it saves, but it takes longer to know that.
    assert answers(Adaptive(CHEAP, is_timed=True), 9.7, load) < 0.15
    assert answers(Policy(), 13.0) == 1.0


def test_a_gap_is_verified_as_far_as_it_holds() -> None:
    drafts, rest = Draft([1] * 11), Draft([1] * 10)
    good = Adaptive(CHEAP)
    for _ in range(200):
        good.learn_gap(drafts, 9)
    assert 8 <= good.gap_size(rest) <= 9
    bad = Adaptive(CHEAP)
    for _ in range(200):
        bad.learn_gap(drafts, 1)
    assert bad.gap_size(rest) == 0


def test_a_gap_is_verified_as_far_as_its_drafter_is_rightly_sure() -> None:
    policy = Adaptive(CHEAP)
    sure = [0.97] * 4 + [0.2] * 4
    rest = Draft([1] * 8, confidence=sure)
    assert policy.gap_size(rest) == 5, "the fifth may well hold, those behind it will not"
    assert policy.gap_size(Draft([1] * 8, confidence=sure[::-1])) <= 2
    for _ in range(200):
        policy.learn_gap(Draft([1] * 9, confidence=[0.2, *sure]), 1)
    assert policy.gap_size(rest) == 0, "sure, and wrong"


def test_whoever_drafts_in_vain_rests_for_whole_answers() -> None:
    policy = Adaptive(CHEAP)
    cycles = 0
    for _ in range(3000):
        if policy.depth(4):
            cycles += 1
            policy.time(Draft([1], confidence=[0.9]), 1.0, 1.05)
            policy.learn(Draft([1], confidence=[0.9]), [])
    assert cycles < 60
    assert policy.way(["plain", "all"]) == "plain" or policy.rule[3][rules.LEFT] < 32
    policy.rule[3][rules.LEFT] = 100.0
    assert policy.way(["plain", "all"]) == "plain"
    policy.learn_answer("plain", Decoded(list(range(61))))
    assert policy.rest() == 39
    policy.rested(39)
    assert policy.depth(4) == 4


@pytest.mark.parametrize(("mean", "scatter", "pays"), [(0.75, 0.08, True), (1.15, 0.08, False)])
def test_answers_that_scatter_are_tried_until_it_is_clear(
    mean: float, scatter: float, pays: bool
) -> None:
    """Whatever the first few of them said."""
    for seed in range(20):
        drawn, policy, used = random.Random(seed), Adaptive(CHEAP, is_timed=True), 0
        for _ in range(300):
            way = policy.way(["plain", "all"])
            used += way == "all"
            taken = drawn.gauss(mean, scatter) if way == "all" else 1.0
            policy.learn_answer(way, Decoded([0] * 31, total_ms=taken * CHEAP.plain_ms(31)))
        assert used > 240 if pays else used < 30


def test_passes_get_the_rows_that_cost_least() -> None:
    # 4-bit weights: slow from two rows on, until at seven another kernel takes over.
    assert row_sizes((28.0, 50.0, 52.0, 68.0, 68.0, 68.0, 41.0, 43.0)) == (1, 7, 7, 7, 7, 7, 7, 8)
    # Two valleys: the cheaper one is worth the longer way.
    assert row_sizes((1.0, 5.0, 3.0, 5.0, 2.0)) == (1, 5, 5, 5, 5)
    # What may be noise is none of our business, nor is what always rises.
    assert row_sizes((10.0, 10.2, 9.9, 10.4)) == (1, 2, 3, 4)
    assert row_sizes((1.0, 2.0, 3.0)) == (1, 2, 3)


def test_a_cycle_that_nobody_timed_says_nothing_of_what_drafting_costs() -> None:
    """As one in which a capture was made, which takes a thousand times as long as its replay."""
    policy = Adaptive(CHEAP)
    for _ in range(5):
        policy.learn(Draft([1], confidence=[0.95]), [0])
    assert policy.drafting_ms == (0.0, 0.0) and policy.depth(4) == 4


def test_an_answer_that_made_captures_is_not_held_against_its_way() -> None:
    policy = Adaptive(CHEAP, is_timed=True)
    ways: list[Way] = ["plain", "all"]
    slow, fast, plain = (Decoded([0] * 61, total_ms=ms) for ms in (500.0, 40.0, 70.0))
    slow.made_captures = True
    for number in range(20):
        way = policy.way(ways)
        drafted = slow if number < 6 else fast
        policy.learn_answer(way, plain if way == "plain" else drafted)
    assert policy.way(ways) == "all"


def test_passes_that_take_less_than_was_measured_make_drafting_no_dearer() -> None:
    """As those that are begun while a GPU still drafts."""
    policy = Adaptive(CHEAP)
    for _ in range(200):
        policy.time(Draft([1, 2], confidence=[0.9, 0.9]), 0.2, 0.1)
        policy.learn(Draft([1, 2], confidence=[0.9, 0.9]), [0])
    assert policy.drafting_ms[1] == pytest.approx(0.1, rel=0.15)
