"""Speculation never changes a token, whatever the drafts are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from jaxtyping import Float
from torch import Tensor

from xsd import bench
from xsd.bench import BenchItem, first_difference
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.config import (
    AGAIN,
    ALL_CONFIGS,
    BASELINE,
    GAP_LEVELS,
    DecodingConfig,
)
from xsd.decoding.costs import Costs
from xsd.decoding.decoded import DRAFTING, PARTS, PASSES, PREFILL
from xsd.decoding.engine import Engine
from xsd.decoding.strategies import parse
from xsd.errors import XsdError
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.config import PairConfig
from xsd.pairs.generate import generate
from xsd.types import Span, Trace

MAX_NEW = 30


class Scripted:
    """Drafts the verifier's own answer, wrong at every ``period``-th position (0: never wrong)."""

    wants_projected = wants_prefilled = False

    def __init__(self, answer: Sequence[int], period: int, gap: int) -> None:
        self.answer, self.period, self.gap = list(answer), period, gap

    def start(self, media: Media, question: str, watch: Stopwatch) -> None: ...
    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None: ...

    def _draft(self, position: int) -> int:
        right = self.answer[position] if position < len(self.answer) else 7
        return (right + 1) % 1024 if self.period and position % self.period == 0 else right

    def gap_drafts(self) -> Draft:
        return Draft([self._draft(i) for i in range(self.gap)])

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        return Draft([self._draft(len(tokens) + i) for i in range(gamma)])

    def finish(self) -> list[Span]:
        return []


class Branching(Scripted):
    """Drafts trees: at every depth something wrong, the verifier's own token, and wrong again."""

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        drafts: list[int] = []
        parents: list[int] = []
        parent = -1
        for depth in range(gamma):
            right = self._draft(len(tokens) + depth)
            drafts += [(right + 3) % 1024, right, (right + 5) % 1024]
            parents += [parent] * 3
            parent = len(drafts) - 2
        return Draft(drafts, parents)


@pytest.fixture(scope="module")
def engine(pair: ModelPair, items: list[BenchItem]) -> Engine:
    return Engine(pair.verifier, MAX_NEW, bench.longest_prompt(pair, items))


@pytest.mark.parametrize("gap", [0, 1, 5, 40])
@pytest.mark.parametrize("gamma", [0, 1, 3, 8])
@pytest.mark.parametrize("period", [0, 1, 2, 5], ids=["always", "never", "alternate", "mostly"])
def test_any_drafts_give_the_plain_answer(
    engine: Engine, items: list[BenchItem], period: int, gamma: int, gap: int
) -> None:
    for item in items:
        question = item.sample.question
        plain = engine.plain(item.media, question)
        script = Scripted(plain.token_ids, period, gap)
        decoded = engine.speculate(item.media, question, script, gamma)
        assert decoded.token_ids == plain.token_ids
        assert sum(decoded.cycle_accepted) <= sum(decoded.cycle_drafted)
        if period == 0 and gap == 0 and gamma:
            assert decoded.cycle_accepted == decoded.cycle_drafted
            assert len(decoded.cycle_drafted) < len(plain.token_ids)
        if period == 1:
            assert decoded.gap_accepted == 0 and not any(decoded.cycle_accepted)


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("period", [0, 3], ids=["always", "mostly"])
def test_rows_of_a_branch_move_together(
    engine: Engine, items: list[BenchItem], period: int, gamma: int
) -> None:
    for item in items:
        question = item.sample.question
        plain = engine.plain(item.media, question)
        decoded = engine.speculate(
            item.media, question, Branching(plain.token_ids, period, 0), gamma
        )
        assert decoded.token_ids == plain.token_ids
        assert sum(decoded.cycle_accepted) > 0
        if period == 0:
            assert max(decoded.cycle_accepted) == gamma


@pytest.mark.parametrize("name", ["E1_decode", "E3_decode", "B1_decode", "text", "E1_tree"])
def test_whole_answers_in_one_call_are_those_of_cycles(
    name: str, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    """The same drafts are verified, and the same of them hold."""
    config = DecodingConfig(max_new_tokens=MAX_NEW, overlap="inline", gamma=5)
    strategies = [parse(BASELINE, 0), parse(name, 5)]
    with ExitStack() as stack:
        party = bench.Bench(
            stack, pair, PairConfig(device="cpu"), items, strategies, adapters, {}, config
        )
        for item in items:
            loop, party.engine._loop = party.engine._loop, None
            apart = [party.decode(item, strategy) for strategy in strategies]
            party.engine._loop = loop
            assert loop is not None
            for strategy, other in zip(strategies, apart, strict=True):
                whole = party.decode(item, strategy)
                assert whole.token_ids == other.token_ids
                assert whole.cycle_drafted == other.cycle_drafted
                assert whole.cycle_accepted == other.cycle_accepted


def test_plain_decoding_is_what_generate_says(
    pair: ModelPair, engine: Engine, items: list[BenchItem]
) -> None:
    for item in items:
        prompt = pair.verifier.prompt_embeddings(item.media, item.sample.question)
        (answer,) = generate(pair.verifier, [prompt[0]], MAX_NEW)
        decoded = engine.plain(item.media, item.sample.question)
        assert decoded.token_ids == answer.ids.tolist()


HEADS = [name for name in ALL_CONFIGS if name.endswith(("_decode", "_tree"))]


@pytest.mark.parametrize(
    ("name", "gamma"),
    [
        *((name, 3) for name in ALL_CONFIGS if name not in (BASELINE, AGAIN)),
        *((name, gamma) for name in HEADS for gamma in (1, 8)),
        *((name, 4) for name in ("synthetic:0.6", "synthetic:0.9,0.6,0.2")),
        *((name, 4) for name in ("L1+ngram", "L3+text", "X1+oracle", "L2+E1")),
    ],
)
def test_every_config_is_lossless(
    name: str, gamma: int, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    config = DecodingConfig(max_new_tokens=MAX_NEW, overlap="inline")
    strategies = [parse(BASELINE, 0), parse(name, gamma), parse(f"{name}@shuffled_events", gamma)]
    templates = {item.sample.question: (5, 6, 7) for item in items}
    records = list(
        bench.run(
            pair, PairConfig(device="cpu"), items, strategies, adapters, templates, config,
            repeats=1, warmup=0, timed=False, answers=templates.items(),
        )
    )  # fmt: skip
    assert len(records) == len(items) * len(strategies)
    for record in records:
        assert isinstance(record, Trace), record
        assert record.lossless and record.first_difference is None
        assert record.total_ms == pytest.approx(record.prefill_ms + record.decode_ms)
        assert set(record.parts) <= set(PARTS) and min(record.parts.values()) >= 0
        assert record.parts[PREFILL] > 0 and record.parts[PASSES] > 0
    drafted = [r for r in records if isinstance(r, Trace) and r.strategy == name]
    assert all(trace.gap_drafted or trace.cycle_drafted for trace in drafted)
    assert all(trace.parts[DRAFTING] > 0 for trace in drafted)


def test_who_still_drafts_at_the_end_is_waited_for_within_the_answers_time(
    engine: Engine, items: list[BenchItem]
) -> None:
    class Slow(Scripted):
        def finish(self) -> list[Span]:
            time.sleep(0.05)
            return []

    asked = items[0].media, items[0].sample.question
    answer = engine.plain(*asked).token_ids
    found = engine.speculate(*asked, Slow(answer, 0, 0), 3)
    [said] = [span for span in found.timeline if span.what == "decode"]
    assert found.total_ms >= said.end_ms + 50 and found.parts[DRAFTING] >= 50
    assert sum(found.parts.values()) == pytest.approx(found.total_ms, abs=5)


def test_the_drafter_process_gives_the_same_answers(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    names = [
        *(f"{level}+VL" for level in GAP_LEVELS),
        "L4+VL:free",
        "L5_decode",
        "L5F_decode",
        "E2_decode",
        "L4+L5F",
        "X1+E3",
        "X1+drafter",
        "drafter+VL",
    ]
    strategies = [parse(BASELINE, 0), *(parse(name, 3) for name in names)]
    records = list(
        bench.run(
            pair, PairConfig(device="cpu"), items[:2], strategies, adapters, {},
            DecodingConfig(max_new_tokens=MAX_NEW, overlap="process"),
            repeats=1, warmup=1, timed=False,
        )
    )  # fmt: skip
    for record in records:
        assert isinstance(record, Trace), record
        assert record.first_difference is None, record.strategy
        lanes = {span.lane for span in record.timeline}
        assert lanes == ({"verifier"} if record.strategy == BASELINE else {"verifier", "drafter"})


def test_an_adapter_that_is_missing_or_does_not_fit_is_named(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    for paths, match in (({}, "L4"), ({"L4": adapters["L3"]}, "holds level L3")):
        with pytest.raises(XsdError, match=match):
            bench.load_adapters(pair, [parse("L4+VL", 0)], paths)


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0


def test_plain_decoding_against_itself_is_a_config_like_any_other(
    pair: ModelPair, items: list[BenchItem]
) -> None:
    records = list(
        bench.run(
            pair, PairConfig(device="cpu"), items, [parse(BASELINE, 0), parse(AGAIN, 0)], {}, {},
            DecodingConfig(max_new_tokens=MAX_NEW), repeats=2, warmup=0, timed=False,
        )
    )  # fmt: skip
    assert len(records) == 4 * len(items)
    for record in records:
        assert isinstance(record, Trace) and record.lossless
        assert not record.cycle_drafted and not record.parts.get(DRAFTING)


def test_shuffled_events_change_the_drafts_but_not_the_answer(
    pair: ModelPair, items: list[BenchItem]
) -> None:
    config = DecodingConfig(max_new_tokens=MAX_NEW, overlap="inline")
    strategies = [parse(n, 0) for n in (BASELINE, "drafter+VL", "drafter+VL@shuffled_events")]
    drafts: dict[str, list[list[int]]] = {}
    for strategy in strategies[1:]:
        with ExitStack() as stack:
            party = bench.Bench(
                stack, pair, PairConfig(device="cpu"), items, [strategies[0], strategy], {}, {},
                config,
            )  # fmt: skip
            speculator = party.speculators[strategy.name]
            assert speculator is not None
            hand_over, drafts[strategy.name] = speculator.gap_drafts, []

            def noted(
                hand_over: Callable[[], list[int]] = hand_over,
                found: list[list[int]] = drafts[strategy.name],
            ) -> list[int]:
                found.append(hand_over())
                return found[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(speculator, "gap_drafts", noted)
                for item in items:
                    for record in party.sample(item, 0):
                        assert isinstance(record, Trace) and record.lossless
    straight, shuffled = drafts.values()
    assert len(straight) == len(shuffled) == len(items)
    assert straight != shuffled


@pytest.mark.parametrize("gap", [1, 2, 5, 40])
@pytest.mark.parametrize("period", [0, 1, 3], ids=["always", "never", "mostly"])
def test_drafts_that_join_the_last_chunk_of_the_prefill_change_nothing(
    pair: ModelPair, engine: Engine, items: list[BenchItem], period: int, gap: int
) -> None:
    longest = bench.longest_prompt(pair, items)
    chunked = Engine(pair.verifier, MAX_NEW, longest, last_chunk=16)
    item = items[0]
    plain = engine.plain(item.media, item.sample.question)
    script = Scripted(plain.token_ids, period, gap)
    decoded = chunked.speculate(item.media, item.sample.question, script, 2)
    apart = engine.speculate(item.media, item.sample.question, script, 2)
    assert decoded.token_ids == plain.token_ids
    assert decoded.gap_accepted == apart.gap_accepted
    # A single draft is checked by the prefill anyhow; more join its last chunk, but for what lies
    # behind an end or beyond the room.
    ends = [
        i for i, token in enumerate(script.gap_drafts().tokens) if token in pair.verifier.eos_ids
    ]
    room = min([gap, MAX_NEW - 1, *(end + 1 for end in ends)])
    assert decoded.num_free == (room if gap > 1 else gap)
    assert (decoded.gap_drafted == decoded.num_free) or gap == 1


@pytest.mark.parametrize("name", ["E1_tree", "E3_tree", "E1_decode", "X1+E3", "ngram"])
def test_the_policy_changes_no_token(
    name: str,
    pair: ModelPair,
    engine: Engine,
    items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:
    """Costs that make every draft worth verifying, and costs that make none."""
    question = items[1].sample.question
    answers = [(question, engine.plain(items[1].media, question).token_ids)]
    config = DecodingConfig(max_new_tokens=MAX_NEW, overlap="inline")
    strategies = [parse(BASELINE, 0), parse(name, 4)]
    with ExitStack() as stack:
        party = bench.Bench(
            stack, pair, PairConfig(device="cpu"), items, strategies, adapters, {}, config, answers
        )
        drafted = []
        for costs in (Costs((9.0, 9.1, 9.2), 1.0), Costs((1.0, 9.0), 1.0)):
            party._prepare(costs)
            drafted.append(0)
            for trace in [one for _ in range(4) for one in party.sample(items[1], 0)]:
                assert isinstance(trace, Trace), trace
                assert trace.first_difference is None
                drafted[-1] += sum(trace.cycle_drafted)
        assert drafted[0] > drafted[1]


def test_drawn_answers_are_drawn_again_alike_and_differ_by_seed(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    said = []
    for seed in (0, 0, 1):
        config = DecodingConfig(
            max_new_tokens=MAX_NEW, overlap="inline", temperature=3.0, top_p=0.95, seed=seed
        )
        strategies = [parse(n, 3) for n in (BASELINE, "E1_decode", "E1_tree")]
        records = bench.run(
            pair, PairConfig(device="cpu"), items[:1], strategies, adapters, {}, config,
            repeats=1, warmup=0, timed=False,
        )  # fmt: skip
        said.append([r.token_ids for r in records if isinstance(r, Trace)])
    assert said[0] == said[1] != said[2]
    assert len(said[0]) == 3
