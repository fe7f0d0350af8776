"""What the engine draws follows the verifier's distribution, with drafts as without."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.decoding.conftest import on
from tests.decoding.test_accept import chi_square_p, drawn_from
from xsd import bench
from xsd.adapters import checkpoint
from xsd.bench import BenchItem
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft, Sampling
from xsd.decoding.batch import AdapterRows, BatchEngine, BatchHead, Proposed
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.draft import HeadOptions
from xsd.decoding.engine import Engine, tree_rows
from xsd.decoding.graphs import CapturedHead
from xsd.decoding.speculator import LocalSpeculator, Speculator
from xsd.decoding.strategies import parse
from xsd.decoding.tables import VerifierTables
from xsd.decoding.tree_graphs import CapturedTreeHead
from xsd.decoding.unread import Unread
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.config import PairConfig
from xsd.types import Span

SAMPLING = Sampling(temperature=5.0, top_p=0.35)
NUM_ANSWERS = 300
NUM_TOKENS = 4
"""Cycles draft up to two of them: the first is the prefill's, the last the verifier's own."""
COUNTED = 2
"""Tokens of an answer whose joint distribution is tested, beside the place of each."""
NUM_BINS = 10


class Exact:
    """The verifier's distribution behind any beginning of one answer, by passes of one row."""

    def __init__(self, pair: ModelPair, item: BenchItem) -> None:
        self.verifier = pair.verifier
        self.cache = self.verifier.new_cache(1, 4096)
        self.found: dict[tuple[int, ...], Tensor] = {}
        with torch.inference_mode():
            prompt = self.verifier.prompt_embeddings(item.media, item.sample.question)
            state = self.verifier.forward(prompt, self.cache)[0, -1:]
            logits = self.verifier.score(state).logits()[0]
        self.num_prompt = self.cache.length
        self.found[()] = SAMPLING.probabilities(logits).cpu()

    @torch.inference_mode()
    def after(self, said: tuple[int, ...]) -> Float[Tensor, " V"]:
        if said not in self.found:
            self.cache.length = self.num_prompt
            for token in said:
                scored = self.verifier.read([token], self.cache)
            self.found[said] = SAMPLING.probabilities(scored.logits()[0]).cpu()
        return self.found[said]

    def joint(self) -> dict[tuple[int, ...], float]:
        chances: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(COUNTED):
            chances = {
                (*said, token): chance * float(self.after(said)[token])
                for said, chance in chances.items()
                for token in self.after(said).nonzero()[:, 0].tolist()
            }
        return chances

    def place(self, said: tuple[int, ...], token: int, at: float) -> float:
        """Where a token falls among all that may follow, the likeliest first, spread over its own
        share by ``at``: uniform on [0, 1) if it was drawn as it should be."""
        p = self.after(said)
        return float(p[p > p[token]].sum() + at * p[token])


class Drawing:
    """Drafts drawn from something near the verifier's distribution, but not it: chains or trees."""

    wants_projected = wants_prefilled = False

    def __init__(self, exact: Exact, *, branches: int, gap: int) -> None:
        self.exact, self.branches, self.gap = exact, branches, gap
        self.generator = torch.Generator().manual_seed(12345)

    def start(self, media: Media, question: str, watch: Stopwatch) -> None: ...
    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None: ...

    def _q(self, said: tuple[int, ...]) -> Float[Tensor, " V"]:
        p = self.exact.after(said)
        off = torch.zeros_like(p)
        off[(int(p.argmax()) + 1) % len(p)] = 1.0
        return 0.5 * p + 0.3 * p.pow(3) / p.pow(3).sum() + 0.2 * off

    def gap_drafts(self) -> Draft:
        said: tuple[int, ...] = ()
        for _ in range(self.gap):
            # Chosen without chance: the likeliest.
            said = (*said, int(self.exact.after(said).argmax()))
        return Draft(list(said))

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        drafts: list[int] = []
        parents: list[int] = []
        rows: list[Tensor] = []
        level = [(-1, tuple(tokens))]
        for _ in range(gamma):
            below = []
            for parent, said in level:
                q = self._q(said)
                for _ in range(self.branches):
                    token = drawn_from(q, self.generator)
                    below.append((len(drafts), (*said, token)))
                    drafts.append(token)
                    parents.append(parent)
                    rows.append(q)
            level = below
        return Draft(drafts, parents if self.branches > 1 else None, torch.stack(rows))

    def finish(self) -> list[Span]:
        return []


class Leaving(Drawing):
    """The same chains, left on the device: drafts that nobody reads before they are verified."""

    def unread(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Unread:
        draft, device = self.propose(tokens, states, gamma), states.device
        assert draft.q is not None
        numbers = torch.tensor([draft.tokens, [0.5] * gamma], dtype=torch.double)
        return Unread(numbers.to(device), q=draft.q.to(device))


class LeavingChosen(Drawing):
    """Trees of the likeliest, left on the device, with rows behind them that are no draft."""

    def unread(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Unread:
        ids: list[int] = []
        parents: list[int] = []
        level = [(-1, tuple(tokens))]
        for _ in range(gamma):
            below = []
            for parent, said in level:
                for token in self._q(said).topk(self.branches).indices.tolist():
                    below.append((len(ids), (*said, token)))
                    ids.append(token)
                    parents.append(parent)
            level = below
        fields = [[*ids, 7], [0.5] * len(ids) + [-1.0], [*parents, 0]]
        numbers = torch.tensor(fields, dtype=torch.double, device=states.device)
        return Unread(numbers, tree_rows([*parents, 0], states.device), gamma)


class DrawingRows:
    """The same for a batch of one question."""

    wants_prefilled = False

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing

    def begin(
        self, questions: Sequence[str], names: Sequence[str], visual: Tensor | None
    ) -> None: ...
    def keep_rows(self, rows: Sequence[int]) -> None: ...

    def propose(
        self, answers: Sequence[list[int]], states: Tensor, fresh: Sequence[int], gamma: int
    ) -> Proposed:
        drafts = [self.drawing.propose(answer, states[0], gamma) for answer in answers]
        rows = [draft.q for draft in drafts if draft.q is not None]
        return Proposed(torch.tensor([draft.tokens for draft in drafts]), torch.stack(rows))


def batch_p_value(
    pair: ModelPair, item: BenchItem, exact: Exact, party: BatchHead | None, gamma: int
) -> tuple[float, int]:
    """As ``p_value``, of answers in batches: each row is an answer of its own seed."""
    size = 10
    engine = BatchEngine(
        pair.verifier, NUM_TOKENS, bench.longest_prompt(pair, [item]), size, sampling=SAMPLING
    )
    seeds = iter(range(NUM_ANSWERS))
    answers: list[list[int]] = []
    num_held = 0
    for _ in range(NUM_ANSWERS // size):
        questions = [item.sample.question] * size
        names = [str(next(seeds)) for _ in questions]
        for decoded in engine.decode_batch([item.media] * size, questions, party, gamma, names):
            answers.append(decoded.token_ids)
            num_held += sum(decoded.cycle_accepted)
    return fit(exact, answers), num_held


def p_value(
    pair: ModelPair,
    item: BenchItem,
    exact: Exact,
    make: Callable[[Engine], Speculator] | None,
    gamma: int,
) -> tuple[float, int]:
    """Of the first tokens of many answers, and how many drafts held; ``make``: who drafts them."""
    question = item.sample.question
    engine = Engine(
        pair.verifier, NUM_TOKENS, bench.longest_prompt(pair, [item]), sampling=SAMPLING
    )
    party = None if make is None else make(engine)
    answers: list[list[int]] = []
    num_held = 0
    for seed in range(NUM_ANSWERS):
        engine.name_draws(str(seed))
        if party is None:
            decoded = engine.plain(item.media, question)
        else:
            decoded = engine.speculate(item.media, question, party, gamma)
        answers.append(decoded.token_ids)
        num_held += decoded.gap_accepted + sum(decoded.cycle_accepted)
    return fit(exact, answers), num_held


def fit(exact: Exact, answers: Sequence[Sequence[int]]) -> float:
    """How well what was said agrees with what the verifier would say."""
    joint, spread = exact.joint(), random.Random(0)
    begun = Counter(tuple(answer[:COUNTED]) for answer in answers)
    places = torch.zeros(NUM_TOKENS, NUM_BINS)
    for answer in answers:
        for index, token in enumerate(answer):
            said = tuple(answer[:index])
            if not exact.after(said)[token] > 0:
                # Said what the verifier never says.
                return 0.0
            place = exact.place(said, token, spread.random())
            places[index, min(NUM_BINS - 1, int(place * NUM_BINS))] += 1
    seen = torch.tensor([float(begun[said]) for said in joint])
    together = chi_square_p(seen, torch.tensor(list(joint.values())))
    even = torch.full((NUM_BINS,), 1 / NUM_BINS)
    found = [together, *(chi_square_p(row, even) for row in places)]
    # The least of several is small more often than one is (Bonferroni).
    return min(1.0, len(found) * min(found))


@pytest.fixture(scope="module")
def exact(pair: ModelPair, items: list[BenchItem]) -> Exact:
    return Exact(pair, items[0])


WAYS = {
    "chain": {"branches": 1, "gap": 0},
    "tree": {"branches": 2, "gap": 0},
    "gap": {"branches": 1, "gap": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_drawn_answers_follow_the_verifier(
    way: str, pair: ModelPair, items: list[BenchItem], exact: Exact
) -> None:
    party = Drawing(exact, **WAYS[way])
    found, num_held = p_value(pair, items[0], exact, lambda _: party, 2)
    assert num_held > NUM_ANSWERS // 10, "a test in which nothing is accepted shows nothing"
    assert found > 0.01


@pytest.mark.parametrize("kind", [Leaving, LeavingChosen])
def test_answers_whose_drafts_nobody_reads_follow_the_verifier(
    kind: type[Drawing], device: torch.device, pair: ModelPair, items: list[BenchItem]
) -> None:
    there = on(device, pair)
    exact = Exact(there, items[0])
    party = kind(exact, branches=1 if kind is Leaving else 2, gap=0)
    found, num_held = p_value(there, items[0], exact, lambda _: party, 2)
    assert num_held > NUM_ANSWERS // 10
    assert found > 0.01


@pytest.mark.parametrize("name", ["E1_decode", "E3_decode", "E1_tree"])
@pytest.mark.parametrize("is_read", [False, True])
def test_answers_of_captured_heads_follow_the_verifier(
    name: str, is_read: bool, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    """Drawn chains and chosen trees, verified unread, or read first."""
    there, level = on(device, pair), name.partition("_")[0]
    head = checkpoint.load(adapters[level])[0].to(device).eval()
    tables = VerifierTables.of(there.verifier)
    width = 2 if name.endswith("tree") else 0
    kind = CapturedTreeHead if width else CapturedHead

    def make(engine: Engine) -> LocalSpeculator:
        options = HeadOptions(
            tree_width=width, tree_nodes=6, sampling=SAMPLING, draws=engine.draft_draws
        )
        party = LocalSpeculator(
            parse(name, 2), there.drafter, tables, {level: head}, {},
            max_new_tokens=NUM_TOKENS, max_prompt=1, max_gap_drafts=0,
            head=kind(head, tables, NUM_TOKENS, options),
        )  # fmt: skip
        if is_read:
            party.unread = lambda *_: None  # type: ignore[method-assign]
        return party

    found, num_held = p_value(there, items[0], Exact(there, items[0]), make, 2)
    # Trees of random weights hold rarely.
    assert num_held > (NUM_ANSWERS // 10 if not width else 0)
    assert found > 0.01


def test_plain_decoding_draws_what_the_verifier_says(
    pair: ModelPair, items: list[BenchItem], exact: Exact
) -> None:
    assert len(exact.joint()) > 3, "an answer without a choice shows nothing"
    assert p_value(pair, items[0], exact, None, 0)[0] > 0.01


def test_the_statistic_sees_a_wrong_rule(
    pair: ModelPair, items: list[BenchItem], exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refused draft was drawn from, in place of what it leaves."""
    monkeypatch.setattr("xsd.decoding.accept.residual", lambda p, q: q)
    for kind in (Drawing, Leaving):
        party = kind(exact, **WAYS["chain"])
        assert p_value(pair, items[0], exact, lambda _, party=party: party, 2)[0] < 1e-3


@pytest.mark.parametrize("drafts", ["none", "near", "B1", "E1"])
def test_the_rows_of_a_batch_follow_the_verifier(
    drafts: str, pair: ModelPair, items: list[BenchItem], exact: Exact, adapters: dict[str, Path]
) -> None:
    """All with one seed: of a head too, whose drafts must not be the same for all answers."""
    party: BatchHead | None = None
    if drafts == "near":
        party = DrawingRows(Drawing(exact, branches=1, gap=0))
    elif drafts != "none":
        head = checkpoint.load(adapters[drafts])[0].eval()
        party = AdapterRows(head, VerifierTables.of(pair.verifier), NUM_TOKENS, SAMPLING)
    found, num_held = batch_p_value(pair, items[0], exact, party, 0 if party is None else 2)
    assert party is None or num_held > NUM_ANSWERS // 10
    assert found > 0.01


def test_the_statistic_sees_a_wrong_rule_of_batches(
    pair: ModelPair, items: list[BenchItem], exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xsd.decoding.accept.residual", lambda p, q: q)
    party = DrawingRows(Drawing(exact, branches=1, gap=0))
    assert batch_p_value(pair, items[0], exact, party, 2)[0] < 1e-3


def test_what_plain_decoding_drew_is_not_judged_with_what_drew_it(
    pair: ModelPair, items: list[BenchItem]
) -> None:
    """``oracle`` drafts what plain decoding drew; and no two samples are drawn alike."""
    config = DecodingConfig(temperature=5.0, max_new_tokens=NUM_TOKENS, overlap="inline")
    strategies = [parse(BASELINE, 0), parse("oracle", 2)]
    with ExitStack() as stack:
        party = bench.Bench(stack, pair, PairConfig(), items[:2], strategies, {}, {}, config)
        seeds = []
        for item in items[:2]:
            for strategy in strategies:
                party.decode(item, strategy)
                seeds.append(party.engine._draws.behind(0, 1).item())
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_drafts_are_drawn_with_random_numbers_of_their_own(pair: ModelPair, seed: int) -> None:
    """Not the verifier's: a draft that knew the number it is held against would change what is
    said. And not those of another cycle or answer."""
    engine = BatchEngine(pair.verifier, NUM_TOKENS, 8, 1, sampling=SAMPLING, seed=seed)
    seen: set[float] = set()
    for name in (None, "one", "another"):
        if name is not None:
            engine.name_draws(name)
        for num_said in range(1, 9):
            row = engine._draws if name is None else engine._draws_of(name)
            for draws in (engine.draft_draws, row):
                drawn = draws.behind(num_said, 8).tolist()
                assert len(set(drawn)) == 8 and not seen & set(drawn)
                seen |= set(drawn)
            # Those of an answer in a batch are those of one alone; fewer are the first of more.
            assert torch.equal(
                engine._draws.behind(num_said, 2, 2).flatten(), row.behind(num_said, 4)
            )
