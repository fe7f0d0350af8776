"""A batch says what each of its questions gets alone, whatever is drafted and however deep."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.decoding.test_engine_sampling import SAMPLING
from xsd.adapters import checkpoint
from xsd.bench import BenchItem
from xsd.decoding.accept import Draft, Sampling
from xsd.decoding.batch import AdapterRows, BatchEngine, Proposed, SeparateRows
from xsd.decoding.controls import Known, NGramHead, OracleHead
from xsd.decoding.decoded import Decoded
from xsd.decoding.draft import HeadDrafter, HeadOptions
from xsd.decoding.speculator import LocalSpeculator
from xsd.decoding.strategies import parse
from xsd.decoding.tables import VerifierTables
from xsd.errors import XsdError
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.generate import generate, prefill
from xsd.scenes.questions import QUESTIONS

MAX_NEW = 30
BATCH = 5


class Scripted:
    """Drafts an answer, each token wrong at a row's own rate; sometimes fewer than asked for."""

    reads_drafter = False

    def __init__(self, answer: Sequence[int], row: int, rate: float | None) -> None:
        self._answer, self._random = list(answer), random.Random(row)
        self._rate = row / (BATCH - 1) if rate is None else rate

    def begin(self, question: str, visual: Tensor | None, reader: object) -> None: ...

    def propose(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Draft:
        assert 1 <= len(states) <= len(tokens)
        # Beyond the answer's end it goes on, so that drafts are cut.
        rest = [*self._answer[len(tokens) :], *range(5, 5 + gamma)][:gamma]
        drafts = [(t + 1) % 1024 if self._random.random() < self._rate else t for t in rest]
        return Draft(drafts[: self._random.randint(gamma // 2, gamma)])


@pytest.fixture(scope="module")
def clip(items: list[BenchItem]) -> Media:
    return items[0].media


@pytest.fixture(scope="module")
def plain(pair: ModelPair, clip: Media) -> dict[str, list[int]]:
    """The answers of batch-1 plain decoding."""
    engine = make_engine(pair, clip)
    return {question: engine.plain(clip, question).token_ids for question in QUESTIONS}


def make_engine(
    pair: ModelPair,
    clip: Media,
    size: int = BATCH,
    max_new: int = MAX_NEW,
    *,
    share: bool = True,
    sampling: Sampling | None = None,
) -> BatchEngine:
    visual = len(pair.verifier.visual_tokens(pair.verifier.pixels(clip)))
    prompts = [pair.verifier.prompt(question) for question in QUESTIONS]
    longest = visual + max(len(p.before) + len(p.after) for p in prompts)
    return BatchEngine(pair.verifier, max_new, longest, size, share_visual=share, sampling=sampling)


def test_the_questions_try_what_a_batch_must_stand(plain: dict[str, list[int]]) -> None:
    lengths = {len(plain[question]) for question in QUESTIONS[:BATCH]}
    assert len(lengths) > 1 and min(lengths) < MAX_NEW


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("size", [1, 2, BATCH, 7])
def test_plain_decoding_of_a_batch(
    pair: ModelPair, clip: Media, plain: dict[str, list[int]], size: int, share: bool
) -> None:
    engine = make_engine(pair, clip, 7, share=share)
    questions = list(QUESTIONS[:size])
    for _ in range(2):  # the cache is used again
        decoded = engine.decode_batch([clip] * size, questions)
        assert [d.token_ids for d in decoded] == [plain[q] for q in questions]
        assert len({(d.prefill_ms, d.total_ms) for d in decoded}) == 1


def test_a_batch_of_several_clips(pair: ModelPair, items: list[BenchItem]) -> None:
    engine = make_engine(pair, items[0].media, share=False)
    media, questions = [i.media for i in items], [i.sample.question for i in items]
    expected = [engine.plain(*pair).token_ids for pair in zip(media, questions, strict=True)]
    assert [d.token_ids for d in engine.decode_batch(media, questions)] == expected
    with pytest.raises(AssertionError, match="one clip"):
        make_engine(pair, items[0].media).decode_batch(media, questions)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("size", [1, BATCH])
@pytest.mark.parametrize("gamma", [1, 3, 8, 16])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, None], ids=["always", "mostly", "never", "by row"])
def test_any_drafts_give_the_plain_answers(
    pair: ModelPair,
    clip: Media,
    plain: dict[str, list[int]],
    rate: float | None,
    gamma: int,
    size: int,
    share: bool,
) -> None:
    engine = make_engine(pair, clip, share=share)
    questions = list(QUESTIONS[:size])
    head = SeparateRows(
        lambda row: Scripted(plain[questions[row]], row, rate), pair.verifier.stack.device
    )
    decoded = engine.decode_batch([clip] * size, questions, head, gamma)
    assert [d.token_ids for d in decoded] == [plain[q] for q in questions]
    for answer in decoded:
        pairs = list(zip(answer.cycle_accepted, answer.cycle_drafted, strict=True))
        assert pairs and all(0 <= accepted <= drafted <= gamma for accepted, drafted in pairs)
        if rate == 0.0:
            assert answer.cycle_accepted == answer.cycle_drafted
        if rate == 1.0:
            assert not any(answer.cycle_accepted)
    if rate is None and size > 1 and gamma > 1:
        depths = {sum(answer.cycle_accepted) for answer in decoded}
        assert len(depths) > 2, "rows were to accept different numbers"


@pytest.mark.parametrize("max_new", [1, 2, 3])
def test_short_answers(
    pair: ModelPair, clip: Media, plain: dict[str, list[int]], max_new: int
) -> None:
    engine = make_engine(pair, clip, max_new=max_new)
    questions = list(QUESTIONS[:BATCH])
    head = SeparateRows(
        lambda row: Scripted(plain[questions[row]], row, 0.0), pair.verifier.stack.device
    )
    for drafts in (None, head):
        decoded = engine.decode_batch([clip] * BATCH, questions, drafts, 4)
        assert [d.token_ids for d in decoded] == [plain[q][:max_new] for q in questions]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("num_passes", range(4))
def test_a_batch_that_fails_leaves_nothing_to_the_next(
    pair: ModelPair,
    clip: Media,
    plain: dict[str, list[int]],
    num_passes: int,
    share: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whichever pass it fails, and whether the next one is as large or smaller."""
    engine, questions = make_engine(pair, clip, share=share), list(QUESTIONS[:BATCH])
    head = SeparateRows(
        lambda row: Scripted(plain[questions[row]], row, None), pair.verifier.stack.device
    )
    forward, left = type(pair.verifier).forward, num_passes

    def broken(*given: Any) -> Tensor:
        nonlocal left
        if not left:
            raise RuntimeError("made up")
        left -= 1
        return forward(*given)

    with monkeypatch.context() as patched:
        patched.setattr(type(pair.verifier), "forward", broken)
        with pytest.raises(RuntimeError, match="made up"):
            engine.decode_batch([clip] * BATCH, questions, head, 4)
    for size in (BATCH, 2):
        decoded = engine.decode_batch([clip] * size, questions[:size], head, 4)
        assert [d.token_ids for d in decoded] == [plain[q] for q in questions[:size]]


@pytest.mark.parametrize("level", [None, "E1"])
def test_rows_without_a_name_draw_each_for_itself(
    level: str | None, pair: ModelPair, clip: Media, adapters: dict[str, Path]
) -> None:
    head = None
    if level is not None:
        adapter = checkpoint.load(adapters[level])[0].eval()
        head = AdapterRows(adapter, VerifierTables.of(pair.verifier), MAX_NEW, SAMPLING)
    engine, asked = make_engine(pair, clip, sampling=SAMPLING), [QUESTIONS[0]] * BATCH
    decoded = engine.decode_batch([clip] * BATCH, asked, head, 3)
    assert len({tuple(row.token_ids) for row in decoded}) == BATCH


def test_an_answer_that_ends_at_once_leaves_the_others_alone(
    pair: ModelPair, clip: Media, plain: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row's first token is made an end; others may meet it later, alone as in the batch."""
    questions = list(QUESTIONS[:BATCH])
    end = {plain[questions[0]][0], plain[questions[1]][9], *pair.verifier.eos_ids}
    monkeypatch.setattr(pair.verifier, "eos_ids", frozenset(end))
    engine = make_engine(pair, clip)
    expected = [engine.plain(clip, question).token_ids for question in questions]
    assert len(expected[0]) == 1 and len({len(ids) for ids in expected}) > 2
    head = SeparateRows(
        lambda row: Scripted(plain[questions[row]], row, 0.3), pair.verifier.stack.device
    )
    for drafts in (None, head):
        decoded = engine.decode_batch([clip] * BATCH, questions, drafts, 4)
        assert [d.token_ids for d in decoded] == expected


class Watched:
    """Asks an adapter, notes what it drafts, and lets scripts draft, which hold to some depth."""

    def __init__(self, adapter: AdapterRows, scripts: SeparateRows) -> None:
        self.adapter, self._scripts = adapter, scripts
        self.wants_prefilled = adapter.wants_prefilled
        self.seen: list[tuple[str, int, list[int]]] = []

    def begin(self, questions: Sequence[str], names: Sequence[str], visual: Tensor | None) -> None:
        self._questions = list(questions)
        self.adapter.begin(questions, names, visual)
        self._scripts.begin(questions, names, visual)

    def propose(
        self, answers: Sequence[list[int]], states: Tensor, fresh: Sequence[int], gamma: int
    ) -> Proposed:
        drafts = self.adapter.propose(answers, states, fresh, gamma).ids.tolist()
        asked = zip(self._questions, answers, fresh, drafts, strict=True)
        self.seen += [(question, len(said), draft) for question, said, new, draft in asked if new]
        return self._scripts.propose(answers, states, fresh, gamma)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._questions = [self._questions[row] for row in rows]
        self.adapter.keep_rows(rows)
        self._scripts.keep_rows(rows)


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("level", ["B1", "E1", "E3"])
def test_a_head_drafts_for_each_row_what_it_drafts_for_one(
    level: str,
    pair: ModelPair,
    clip: Media,
    plain: dict[str, list[int]],
    adapters: dict[str, Path],
    share: bool,
) -> None:
    verifier, questions = pair.verifier, list(QUESTIONS[:BATCH])
    adapter = checkpoint.load(adapters[level], expect_level=level)[0].eval()
    tables = VerifierTables.of(verifier)
    scripts = SeparateRows(
        lambda row: Scripted(plain[questions[row]], row, None), verifier.stack.device
    )
    head = Watched(AdapterRows(adapter, tables, MAX_NEW), scripts)
    decoded = make_engine(pair, clip, share=share).decode_batch([clip] * BATCH, questions, head, 4)
    assert [d.token_ids for d in decoded] == [plain[q] for q in questions]
    alone = HeadDrafter(adapter, tables, MAX_NEW)
    visual = verifier.visual_tokens(verifier.pixels(clip))
    for question in questions:
        prompt = verifier.prompt(question)
        rows = verifier.embed_prompt(prompt, visual)
        _, states = prefill(verifier, [rows[0]], 0)
        clips = pool_visual(states[0, len(prompt.before) :][: len(visual)])
        [answer] = generate(verifier, [rows[0]], MAX_NEW)
        seen = [(length, drafts) for asked, length, drafts in head.seen if asked == question]
        assert seen
        for length, drafts in seen:
            alone.begin(question, clips if head.wants_prefilled else None, None)
            expected = alone.propose(plain[question][:length], answer.hidden[:length], len(drafts))
            assert drafts[: len(expected)] == expected.tokens


@pytest.mark.parametrize("level", ["B1", "E1", "E3"])
@pytest.mark.parametrize("size", [1, BATCH])
def test_a_head_changes_no_answer(
    size: int,
    level: str,
    pair: ModelPair,
    clip: Media,
    plain: dict[str, list[int]],
    adapters: dict[str, Path],
) -> None:
    adapter = checkpoint.load(adapters[level], expect_level=level)[0].eval()
    head = AdapterRows(adapter, VerifierTables.of(pair.verifier), MAX_NEW)
    questions = list(QUESTIONS[:size])
    decoded = make_engine(pair, clip).decode_batch([clip] * size, questions, head, 4)
    assert [d.token_ids for d in decoded] == [plain[q] for q in questions]
    assert all(d.cycle_drafted for d in decoded)


def test_controls_draft_for_a_batch(
    pair: ModelPair, clip: Media, plain: dict[str, list[int]]
) -> None:
    engine, questions = make_engine(pair, clip), list(QUESTIONS[:BATCH])
    answers = [(question, plain[question]) for question in questions]

    def oracle(row: int) -> OracleHead:
        known = Known()
        known.answer = plain[questions[row]]
        return OracleHead(known, [0.6], pair.verifier.vocab_size, row)

    def ngram(row: int) -> NGramHead:
        return NGramHead(lambda question: pair.verifier.prompt(question).after, answers)

    for make in (oracle, ngram):
        head = SeparateRows(make, pair.verifier.stack.device)
        decoded = engine.decode_batch([clip] * BATCH, questions, head, 4)
        assert [d.token_ids for d in decoded] == [plain[q] for q in questions]
        assert any(sum(d.cycle_accepted) for d in decoded)


@pytest.mark.parametrize("level", ["L5", "L5F", "E2"])
def test_a_head_that_reads_the_drafter_is_refused(
    level: str, pair: ModelPair, adapters: dict[str, Path]
) -> None:
    adapter, _ = checkpoint.load(adapters[level], expect_level=level)
    with pytest.raises(XsdError, match=f"{level} reads the drafter"):
        AdapterRows(adapter, VerifierTables.of(pair.verifier), MAX_NEW)


def test_heads_of_separate_rows_draw_no_drafts(
    pair: ModelPair, clip: Media, adapters: dict[str, Path]
) -> None:
    """As if chosen they would be accepted with p, not with min(1, p/q): lossless, but too few."""
    engine = make_engine(pair, clip, sampling=SAMPLING)
    adapter = checkpoint.load(adapters["B1"])[0].eval()
    options = HeadOptions(sampling=SAMPLING, draws=engine.draft_draws)
    drawing = HeadDrafter(adapter, VerifierTables.of(pair.verifier), MAX_NEW, options)
    head = SeparateRows(lambda row: drawing, pair.verifier.stack.device)
    with pytest.raises(AssertionError, match="draw no drafts"):
        engine.decode_batch([clip], [QUESTIONS[0]], head, 2)


@pytest.mark.parametrize("level", [None, "B1", "E1", "E3"])
@pytest.mark.parametrize("size", [2, BATCH])
def test_a_row_draws_what_it_would_draw_alone(
    pair: ModelPair,
    clip: Media,
    adapters: dict[str, Path],
    level: str | None,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever its neighbours are, however soon they end, and wherever it moves to then."""
    gamma = 3
    # The first two rows differ in nothing but their names.
    questions = [QUESTIONS[0], *QUESTIONS[: size - 1]]
    names = [f"answer {row}" for row in range(size)]

    def draw_rows(batch: BatchEngine) -> list[Decoded]:
        rows = None
        if level is not None:
            adapter = checkpoint.load(adapters[level])[0].eval()
            rows = AdapterRows(adapter, VerifierTables.of(pair.verifier), MAX_NEW, SAMPLING)
        return batch.decode_batch([clip] * size, questions, rows, gamma if rows else 0, names)

    # Few rows of a flat distribution meet an end: make it one that some have met early.
    early = {
        found.token_ids[:7][-1] for found in draw_rows(make_engine(pair, clip, sampling=SAMPLING))
    }
    ends = frozenset({*sorted(early)[: size // 2], *pair.verifier.eos_ids})
    monkeypatch.setattr(pair.verifier, "eos_ids", ends)
    batch = make_engine(pair, clip, sampling=SAMPLING)
    found = draw_rows(batch)
    greedy = make_engine(pair, clip).decode_batch([clip] * size, questions)
    for drawn, chosen in zip(found, greedy, strict=True):
        assert drawn.token_ids != chosen.token_ids, "a greedy answer shows nothing"
    assert len({tuple(drawn.token_ids) for drawn in found}) == size
    lengths = sorted(len(drawn.token_ids) for drawn in found)
    assert 4 * sum(length < lengths[-1] for length in lengths) >= size, "rows were to leave"
    for question, name, drawn in zip(questions, names, found, strict=True):
        batch.name_draws(name)
        if level is None:
            alone = batch.plain(clip, question)
        else:
            tables = VerifierTables.of(pair.verifier)
            adapter = checkpoint.load(adapters[level])[0].eval()
            options = HeadOptions(sampling=SAMPLING, draws=batch.draft_draws)
            head = HeadDrafter(adapter, tables, MAX_NEW, options)
            party = LocalSpeculator(
                parse(f"{level}_decode", gamma), pair.drafter, tables, {level: adapter}, {},
                max_new_tokens=MAX_NEW, max_prompt=1, max_gap_drafts=0, head=head,
            )  # fmt: skip
            alone = batch.speculate(clip, question, party, gamma)
        assert drawn.token_ids == alone.token_ids
        assert drawn.cycle_accepted == alone.cycle_accepted
    if level is not None:
        accepted = sum(sum(drawn.cycle_accepted) for drawn in found)
        refused = sum(sum(drawn.cycle_drafted) for drawn in found) - accepted
        assert accepted and refused, "drafts of both kinds were to occur"
