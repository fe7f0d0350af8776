"""What ``xsd generate`` marks is what the engine verified and accepted, whatever is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import Float
from torch import Tensor

from xsd.bench import Bench, BenchItem
from xsd.cli.marked import Mark, MarkedText, Watched
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft, Sampling
from xsd.decoding.config import DecodingConfig
from xsd.decoding.costs import Costs
from xsd.decoding.decoded import Decoded
from xsd.decoding.engine import Engine
from xsd.decoding.policy import Adaptive, Policy
from xsd.decoding.speculator import Speculator
from xsd.decoding.strategies import parse
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.config import PairConfig
from xsd.types import Span

LIMIT = 24
DEAR = Costs((1.0, 9.0), 1.0)
FAIR = Costs((1.0, 1.3, 1.9, 2.6, 3.4, 4.2, 5.0), 1.0)
FREE = Costs((1.0,) * 30, 1.0)


class Told(MarkedText):
    """Remembers how every token was marked."""

    def __init__(self) -> None:
        self.marks: list[Mark | None] = []

    def add(self, ids: Sequence[int], mark: Mark | None) -> None:
        self.marks += [mark] * len(ids)


def shown(
    engine: Engine, item: BenchItem, party: Speculator, policy: Policy, gamma: int
) -> tuple[Told, Decoded]:
    text = Told()
    watched = Watched(party, policy, text, engine.max_new_tokens)
    question = item.sample.question
    decoded = engine.speculate(item.media, question, watched, gamma, watched.policy)
    watched.show(decoded.token_ids)
    assert len(text.marks) == len(decoded.token_ids)
    assert text.marks.count("gap") == decoded.gap_accepted
    assert text.marks.count("head") == sum(decoded.cycle_accepted)
    return text, decoded


class Knowing:
    """Drafts an answer that it knows: ``num_gap`` tokens of it in the gap, then chains, or trees
    with a wrong guess beside every right one; some of it wrong."""

    wants_projected = wants_prefilled = False

    def __init__(self, answer: list[int], num_gap: int, is_tree: bool) -> None:
        self.answer, self.num_gap, self.is_tree = answer, num_gap, is_tree
        self.chance = random.Random(0)

    def start(self, media: Media, question: str, watch: Stopwatch) -> None: ...
    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def gap_drafts(self) -> Draft:
        return Draft(self.answer[: self.num_gap])

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        right = self.answer[len(tokens) :][:gamma]
        right = [token if self.chance.random() < 0.8 else 7 for token in right]
        if not self.is_tree:
            return Draft(right, confidence=[0.8] * len(right))
        both = [token for one in right for token in (9, one)]
        parents = [2 * (index // 2) - 1 for index in range(len(both))]
        return Draft(both, parents, None, [0.1, 0.8] * len(right))

    def finish(self) -> list[Span]:
        return []


@pytest.mark.parametrize("limit", [2, 3, LIMIT])
@pytest.mark.parametrize("costs", [DEAR, FAIR, FREE, None], ids=["dear", "fair", "free", "fixed"])
@pytest.mark.parametrize("is_tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("num_gap", [0, 1, 30])
def test_drafts_that_a_policy_cuts_are_not_marked(
    num_gap: int, is_tree: bool, costs: Costs | None, limit: int,
    pair: ModelPair, items: list[BenchItem],
) -> None:  # fmt: skip
    item = items[0]
    engine = Engine(pair.verifier, limit, 400)
    answer = engine.plain(item.media, item.sample.question).token_ids
    party = Knowing(answer, num_gap, is_tree)
    policy = Policy() if costs is None else Adaptive(costs)
    text, decoded = shown(engine, item, party, policy, 5)
    assert decoded.token_ids == answer
    if costs is DEAR and limit == LIMIT:
        # Everything held, next to nothing was worth a pass.
        assert text.marks.count(None) > len(answer) // 2


@pytest.mark.parametrize("num_gap", [2, 30])
@pytest.mark.parametrize("limit", [3, LIMIT])
def test_drafts_that_join_the_prefill(
    num_gap: int, limit: int, pair: ModelPair, items: list[BenchItem]
) -> None:
    engine = Engine(pair.verifier, limit, 400, last_chunk=16)
    item = items[1]
    answer = engine.plain(item.media, item.sample.question).token_ids
    shown(engine, item, Knowing(answer, num_gap, False), Adaptive(DEAR), 5)


def test_drawn_answers(pair: ModelPair, items: list[BenchItem]) -> None:
    item = items[0]
    engine = Engine(pair.verifier, LIMIT, 400, sampling=Sampling(0.7))
    for seed in range(5):
        engine.name_draws(str(seed))
        answer = engine.plain(item.media, item.sample.question).token_ids
        for is_tree in (False, True):
            shown(engine, item, Knowing(answer, 10, is_tree), Adaptive(FAIR), 5)


NAMES = ("X1+VL", "L4+VL:free", "E1_decode", "E1_tree", "X1+E3", "X1+drafter", "drafter+VL",
         "template+VL", "ngram", "oracle", "synthetic:.7")  # fmt: skip


@pytest.mark.parametrize("costs", [DEAR, FAIR], ids=["dear", "fair"])
def test_every_kind_of_config(
    costs: Costs, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    given: dict[str, Any] = {"max_new_tokens": LIMIT, "overlap": "inline"}
    strategies = [parse("vl_baseline", 0), *(parse(name, 4) for name in NAMES)]
    setup = PairConfig(device="cpu")
    engine = Engine(pair.verifier, LIMIT, 400)
    templates = {
        item.sample.question: engine.plain(item.media, item.sample.question).token_ids
        for item in items
    }
    with ExitStack() as stack:
        bench = Bench(
            stack, pair, setup, items, strategies, adapters, templates, DecodingConfig(**given),
            list(templates.items()),
        )  # fmt: skip
        bench._prepare(costs)
        accepted: dict[str, int] = {}
        for item in items:
            bench.decode(item, strategies[0])
            for strategy in strategies[1:]:
                party, policy = bench.speculators[strategy.name], bench.policies[strategy.name]
                assert party is not None
                text, _ = shown(bench.engine, item, party, policy, max(1, strategy.gamma))
                num = len(text.marks) - text.marks.count(None)
                accepted[strategy.name] = accepted.get(strategy.name, 0) + num
    if costs is FAIR:
        assert min(accepted[name] for name in ("template+VL", "oracle", "synthetic:.7")) > 0
