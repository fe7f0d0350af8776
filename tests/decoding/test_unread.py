"""Drafts that are verified before anybody reads them: they change no token, and a cycle on a GPU
waits once."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.conftest import needs_gpu, on
from xsd import bench
from xsd.adapters import checkpoint
from xsd.adapters.base import Adapter
from xsd.bench import BenchItem
from xsd.decoding import graphs
from xsd.decoding.accept import Sampling
from xsd.decoding.batch import AdapterRows, BatchEngine
from xsd.decoding.config import BASELINE
from xsd.decoding.controls import NGramHead
from xsd.decoding.costs import Costs
from xsd.decoding.coupled_graphs import CapturedCoupled
from xsd.decoding.draft import Head, HeadDrafter, HeadOptions
from xsd.decoding.engine import Engine, tree_rows
from xsd.decoding.measure import measure_drafting
from xsd.decoding.policy import Adaptive, Policy
from xsd.decoding.rote import Eager, Rote
from xsd.decoding.speculator import LocalSpeculator, Speculator
from xsd.decoding.strategies import parse
from xsd.decoding.streams import StreamSpeculator
from xsd.decoding.tables import VerifierTables
from xsd.decoding.tree_graphs import CapturedTreeHead, likeliest
from xsd.decoding.unread import Unread
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.cache import TreeRows
from xsd.pairs.capture import Made
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.pairs.device import to_device

MAX_NEW = 30
SAMPLING = Sampling(temperature=1.0, top_p=0.9)
TREE = HeadOptions(tree_width=3, tree_nodes=10)
CHEAP = Costs((1.0,) * 64, 1.0)
"""Of a verifier whose rows cost nothing."""


class Scripted(Rote):
    """Drafts an answer that it knows, each token wrong now and then, and leaves it on the device;
    behind the answer's end it goes on."""

    num_siblings = 1

    def __init__(self, answer: Sequence[int], rate: float, device: torch.device) -> None:
        self._answer, self._rate, self._device = list(answer), rate, device
        self._random = random.Random(0)

    def unread(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Unread:
        rest = [*self._answer[len(tokens) :], *range(5, 5 + gamma)][:gamma]
        return self._left([self._perhaps(token) for token in rest], [0.5] * gamma)

    def _left(self, *fields: list[Any]) -> Unread:
        return Unread(to_device(fields, self._device).double())

    def _perhaps(self, token: int) -> int:
        return token if self._random.random() >= self._rate else (token + 1) % 1024


class Branching(Scripted):
    """The same as a tree, which ends where the answer does: of two siblings the second is right,
    and goes on. What is there beyond the tree is no draft."""

    num_siblings = 2

    def unread(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Unread:
        ids: list[int] = []
        parents: list[int] = []
        for token in self._answer[len(tokens) :][:gamma]:
            parents += [len(ids) - 1] * 2
            ids += [(token + 2) % 1024, self._perhaps(token)]
        chances = [0.5] * len(ids)
        found = self._left([*ids, ids[1]], [*chances, -1.0], [*parents, -1])
        return Unread(found.numbers, tree_rows([*parents, -1], self._device), gamma)


def unfused(verifier: Decoder, longest: int, strict_rows: int | None = None) -> Engine:
    """Cycles that are made one by one, as they are on a GPU."""
    engine = Engine(verifier, MAX_NEW, longest, strict_rows=strict_rows)
    engine._loop = None
    return engine


@pytest.mark.parametrize("gamma", [1, 3, 8])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [Scripted, Branching])
@pytest.mark.parametrize("strict_rows", [None, 7, 18])
def test_drafts_that_are_verified_unread_change_no_token(
    strict_rows: int | None, kind: type[Scripted], rate: float, gamma: int, device: torch.device,
    pair: ModelPair, items: list[BenchItem],
) -> None:  # fmt: skip
    """Of those that are longer than a strict pass, what fits is verified."""
    verifier = on(device, pair).verifier
    engine = unfused(verifier, bench.longest_prompt(pair, items), strict_rows)
    num_held = 0
    for item in items:
        asked = item.media, item.sample.question
        plain = engine.plain(*asked).token_ids
        party = kind(plain, rate, device)
        for policy in (Policy(), Adaptive(CHEAP)):
            answer = engine.speculate(*asked, party, gamma, policy)
            assert answer.token_ids == plain
            drafted = [size / kind.num_siblings for size in answer.cycle_drafted]
            accepted = answer.cycle_accepted
            pairs = list(zip(accepted, drafted, strict=True))
            assert pairs and all(a <= d <= gamma for a, d in pairs)
            num_held += sum(accepted)
            if rate == 0.0:
                assert accepted == drafted
            assert answer.parts["drafting"] > 0.0
    assert (num_held > 0) == (rate < 1.0)


def test_what_unread_drafts_cost_is_measured(
    device: torch.device, pair: ModelPair, items: list[BenchItem]
) -> None:
    engine = unfused(on(device, pair).verifier, bench.longest_prompt(pair, items))
    asked = items[0].media, items[0].sample.question
    party = Scripted(engine.plain(*asked).token_ids, 0.3, device)
    found = measure_drafting(engine, *asked, party, 4)
    assert found is not None
    first_ms, level_ms = found
    assert first_ms > 0.0 and level_ms >= 0.0
    # Who drafts a varying number of tokens on the host is timed as it is used.
    assert measure_drafting(engine, *asked, Rote(), 4) is None


def test_what_a_gap_takes_is_no_part_of_what_drafts_cost(
    pair: ModelPair, items: list[BenchItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what a drafter takes to begin."""
    engine = unfused(pair.verifier, bench.longest_prompt(pair, items))
    asked = items[0].media, items[0].sample.question
    answer = engine.plain(*asked).token_ids
    party = Scripted(answer, 0.0, torch.device("cpu"))
    monkeypatch.setattr(party, "start", lambda *_: time.sleep(0.1))
    found = measure_drafting(engine, *asked, party, 2)
    assert found is not None and sum(found) < 50.0 / len(answer)


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("name", ["B1_decode", "E1_decode", "E2_decode", "E3_decode"])
def test_a_head_whose_drafts_are_not_read_decodes_as_one_whose_drafts_are(
    name: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    assert_drafters_agree(
        name, (HeadDrafter, graphs.CapturedHead), None, on(device, pair), items, adapters
    )


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("name", ["E1_tree", "E3_tree"])
def test_a_tree_that_is_not_read_decodes_as_one_that_is(
    name: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    assert_drafters_agree(
        name, (HeadDrafter, CapturedTreeHead), TREE, on(device, pair), items, adapters
    )


def assert_drafters_agree(
    name: str, kinds: tuple[type[HeadDrafter], ...], options: HeadOptions | None,
    there: ModelPair, items: list[BenchItem], adapters: dict[str, Path],
) -> None:  # fmt: skip
    """What they say is plain decoding's, and cycle by cycle as much of the drafts holds."""
    longest = bench.longest_prompt(there, items)
    engine, level = unfused(there.verifier, longest), name.partition("_")[0]
    head = checkpoint.load(adapters[level])[0].to(there.verifier.stack.device).eval()
    tables = VerifierTables.of(there.verifier)
    counts = []
    for kind in kinds:
        party = LocalSpeculator(
            parse(name, 0), there.drafter, tables, {level: head}, {},
            max_new_tokens=MAX_NEW, max_prompt=longest, max_gap_drafts=0,
            head=kind(head, tables, MAX_NEW, options),
        )  # fmt: skip
        found = [counted(engine, party, item) for item in items]
        counts.append(found)
    assert counts[0] == counts[1]


def counted(engine: Engine, party: Speculator, item: BenchItem) -> tuple[list[int], list[int]]:
    asked = item.media, item.sample.question
    answer = engine.speculate(*asked, party, 3)
    assert answer.token_ids == engine.plain(*asked).token_ids
    return answer.cycle_drafted, answer.cycle_accepted


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("name", ["X1+drafter", "L4+drafter"])
def test_a_drafter_that_goes_on_unread_decodes_as_one_whose_drafts_are_read(
    name: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    there = on(device, pair)
    engine = unfused(there.verifier, bench.longest_prompt(pair, items))
    captured, read = (going_on(name, there, items, adapters) for _ in range(2))
    if device.type == "cpu":
        assert captured.reader is not None and captured.gap_adapter is not None
        given = captured.reader, captured.gap_adapter, captured.tables, MAX_NEW
        captured.coupled = CapturedCoupled(*given)
    assert isinstance(captured.coupled, CapturedCoupled)
    read.unread = lambda *_: None  # type: ignore[method-assign]
    for item in items:
        assert counted(engine, captured, item) == counted(engine, read, item)


def going_on(
    name: str, there: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> LocalSpeculator:
    level, longest = name.partition("+")[0], bench.longest_prompt(there, items)
    adapter = checkpoint.load(adapters[level])[0].to(there.drafter.stack.device).eval()
    return LocalSpeculator(
        parse(name, 3), there.drafter, VerifierTables.of(there.verifier), {level: adapter}, {},
        max_new_tokens=MAX_NEW, max_prompt=longest, max_gap_drafts=4,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("is_tree", [False, True])
def test_what_is_cut_of_a_draft_is_what_is_cut_of_it_when_it_has_been_read(
    is_tree: bool, size: int
) -> None:
    parents = [-1, -1, 0, 2, 2] if is_tree else None
    fields = [[7, 8, 9, 3, 4], [0.9, 0.1, 0.8, 0.7, 0.2], *([parents] if parents else [])]
    numbers = torch.tensor(fields, dtype=torch.double)
    q = None if is_tree else torch.rand(5, 11)
    tree = None if parents is None else tree_rows(parents, torch.device("cpu"))
    whole = Unread(numbers, tree, 3 if is_tree else 0, q)
    cut, expected = whole.cut(size), whole.read().cut(size)
    assert len(cut) == len(expected)
    read, choices = cut.read_with(torch.arange(len(cut) + 3))
    assert choices == list(range(len(cut) + 1))
    for draft in (read, cut.read()):
        assert (draft.tokens, draft.parents) == (expected.tokens, expected.parents)
        assert (draft.confidence, draft.depth) == (expected.confidence, expected.depth)
        assert (draft.q is None) == is_tree
        assert draft.q is None or torch.equal(draft.q, expected.q)
    if cut.tree is not None:
        assert expected.parents is not None
        rows = tree_rows(expected.parents, torch.device("cpu"))
        assert torch.equal(cut.tree.depths, rows.depths)
        assert torch.equal(cut.tree.ancestors, rows.ancestors)


def test_no_draft_fits_a_strict_pass_of_one_row(
    device: torch.device, pair: ModelPair, items: list[BenchItem]
) -> None:
    engine = unfused(on(device, pair).verifier, bench.longest_prompt(pair, items), 1)
    asked = items[0].media, items[0].sample.question
    plain = engine.plain(*asked).token_ids
    answer = engine.speculate(*asked, Scripted(plain, 0.0, device), 4)
    assert answer.token_ids == plain and not answer.cycle_drafted


@pytest.mark.parametrize("num_kept", [1, 4, 9, 40])
def test_what_is_kept_of_a_tree_is_a_tree(num_kept: int) -> None:
    draw = random.Random(num_kept)
    for _ in range(20):
        nodes = drawn_tree(draw)
        depth = 1 + max(depth_of(node, nodes) for node in range(len(nodes)))
        given = torch.tensor(nodes, dtype=torch.double).t()
        numbers, *branches = likeliest(given, num_kept, depth)
        unread = Unread(numbers, TreeRows(*branches), depth)
        kept = sorted(range(len(nodes)), key=lambda node: -nodes[node][3])[:num_kept]
        number = {-1: -1} | {node: i for i, node in enumerate(kept)}
        real = [node for node in kept if nodes[node][3] >= 0]
        draft = unread.read()
        assert draft.tokens == [nodes[node][0] for node in real]
        assert draft.parents == [number[int(nodes[node][1])] for node in real]
        assert draft.confidence == [nodes[node][2] for node in real]
        # Rows of what is no draft look somewhere, and nobody looks at them.
        size, expected = 1 + len(real), tree_rows(draft.parents, torch.device("cpu"))
        assert unread.tree is not None
        assert torch.equal(unread.tree.depths[:size], expected.depths)
        assert torch.equal(unread.tree.ancestors[:size, :size], expected.ancestors)
        assert not unread.tree.ancestors[:size, size:].any()


Node = tuple[int, int, float, float]


def drawn_tree(draw: random.Random) -> list[Node]:
    """Parents first, many as likely as each other; what follows the hopeless is no guess."""
    nodes: list[Node] = []
    for token in range(draw.randint(1, 30)):
        parent = draw.randint(-1, len(nodes) - 1)
        before = 1.0 if parent == -1 else nodes[parent][3]
        sure = draw.choice((0.25, 0.5, 1.0, 1.0))
        is_guess = before >= 0.0 and draw.random() < 0.9
        nodes.append((token, parent, sure, before * sure if is_guess else -1.0))
    return nodes


def depth_of(node: int, nodes: list[Node]) -> int:
    return 0 if nodes[node][1] == -1 else 1 + depth_of(int(nodes[node][1]), nodes)


def waits(
    engine: Engine, party: Speculator | None, item: BenchItem, policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[int, int]]:  # fmt: skip
    """Of a short answer and a longer one: how often the verifier's thread waits for the device,
    and how many passes it makes."""
    asked = item.media, item.sample.question

    def answer() -> bool:
        if party is None:
            return not engine.plain(*asked).made_captures
        decoded = engine.speculate(*asked, party, 4, policy)
        # A capture is waited for, and is made once; a busy drafter's thread may be late.
        return bool(decoded.cycle_drafted) and not decoded.made_captures

    return waits_of(engine, "read", answer, monkeypatch)


def waits_of(
    engine: Engine, a_pass: str, answer: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """The same of any way to answer, which says whether the answer counts, and of passes by the
    verifier's method ``a_pass``."""
    found, counts, caller = [], Counter[str](), current_thread()
    make = getattr(engine.verifier, a_pass)

    def counting(*given: Any) -> Any:
        counts["passes"] += 1
        return make(*given)

    def note(*_: object, **__: object) -> None:
        if current_thread() is caller:
            counts["waits"] += 1

    monkeypatch.setattr(engine.verifier, a_pass, counting)
    for max_new in (MAX_NEW // 2, MAX_NEW):
        engine.max_new_tokens = max_new
        for _ in range(20):
            counts.clear()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    warnings.showwarning = note
                    is_done = answer()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if is_done:
                break
        assert is_done
        found.append((counts["waits"], counts["passes"]))
    return found


@needs_gpu
@pytest.mark.parametrize("name", ["E1_decode", "E1_tree", "E3_tree", "X1+drafter", "L4+drafter"])
@pytest.mark.parametrize("is_adaptive", [False, True])
@pytest.mark.parametrize("strict_rows", [None, 12])
def test_a_cycle_waits_once_for_the_device(
    strict_rows: int | None, name: str, is_adaptive: bool, items: list[BenchItem],
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    policy = Eager(CHEAP) if is_adaptive else Policy()
    engine, party = on_gpu(name, items, adapters, policy, strict_rows=strict_rows)
    (few, short), (many, long) = waits(engine, party, items[0], policy, monkeypatch)
    assert long > short and many - few == long - short


@needs_gpu
@pytest.mark.parametrize(
    "name", [BASELINE, "ngram", "E1_decode", "E3_decode", "E1_tree", "X1+drafter", "L4+drafter"]
)
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_a_cycle_of_drawn_tokens_waits_once_for_the_device(
    name: str, is_adaptive: bool, items: list[BenchItem], adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    policy = Eager(CHEAP) if is_adaptive else Policy()
    is_plain = name == BASELINE
    engine, local = on_gpu("ngram" if is_plain else name, items, adapters, policy, SAMPLING)
    party = None if is_plain else local
    (few, short), (many, long) = waits(engine, party, items[0], policy, monkeypatch)
    assert long > short and many - few == long - short


@needs_gpu
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "drawn"])
@pytest.mark.parametrize("level", [None, "E1"])
def test_a_batch_waits_once_a_pass_for_the_device(
    sampling: Sampling | None, level: str | None, items: list[BenchItem],
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = load_pair(PairConfig(device="cuda"))
    longest, size = bench.longest_prompt(there, items), 2
    engine = BatchEngine(there.verifier, MAX_NEW, longest, size, sampling=sampling)
    head = None
    if level is not None:
        adapter = checkpoint.load(adapters[level])[0].to("cuda").eval()
        head = AdapterRows(adapter, VerifierTables.of(there.verifier), MAX_NEW, sampling)
    # Rows that have ended stay: moving others to where they were is waited for.
    monkeypatch.setattr("xsd.decoding.batch._worth_leaving", lambda *_: False)
    media, questions = [items[0].media] * size, [item.sample.question for item in items[:size]]

    def answer() -> bool:
        captures = Made.count
        engine.decode_batch(media, questions, head, 4 if head else 0)
        return Made.count == captures

    (few, short), (many, long) = waits_of(engine, "forward", answer, monkeypatch)
    assert long > short and many - few == long - short


@needs_gpu
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_moving_what_is_kept_of_a_tree_waits_for_nothing(
    rate: float, items: list[BenchItem], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = on_gpu("E1_tree", items, adapters, Policy())
    answer = engine.plain(items[0].media, items[0].sample.question).token_ids
    party = Branching(answer, rate, torch.device("cuda"))
    (few, short), (many, long) = waits(engine, party, items[0], Policy(), monkeypatch)
    assert long > short and many - few == long - short


@needs_gpu
def test_the_drafters_thread_keeps_the_verifiers_from_no_device(
    items: list[BenchItem], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, local = on_gpu("X1+drafter", items, adapters, Policy())
    party = StreamSpeculator(local, torch.device("cuda"))
    drafts = party._board.drafts

    def patient(count: int) -> list[int]:
        """The verifier is faster, and would find nothing."""
        until = time.monotonic() + 0.05
        while not (found := drafts(count)) and time.monotonic() < until:
            time.sleep(1e-3)
        return found

    monkeypatch.setattr(party._board, "drafts", patient)
    (few, short), (many, long) = waits(engine, party, items[0], Policy(), monkeypatch)
    assert long > short and many - few == long - short


def on_gpu(
    name: str, items: list[BenchItem], adapters: dict[str, Path], policy: Policy,
    sampling: Sampling | None = None, strict_rows: int | None = None,
) -> tuple[Engine, LocalSpeculator]:  # fmt: skip
    there = load_pair(PairConfig(device="cuda"))
    longest = bench.longest_prompt(there, items)
    engine = Engine(there.verifier, MAX_NEW, longest, sampling=sampling, strict_rows=strict_rows)
    if "+" in name:
        return engine, going_on(name, there, items, adapters)
    level, _, kind = name.partition("_")
    tables = VerifierTables.of(there.verifier)
    head: Head
    loaded: dict[str, Adapter] = {}
    if level == "ngram":
        asked = items[0].media, items[0].sample.question
        known = [(asked[1], engine.plain(*asked).token_ids)]
        head = NGramHead(lambda question: there.verifier.prompt(question).after, known)
    else:
        loaded[level] = checkpoint.load(adapters[level])[0].to("cuda").eval()
        draws = None if sampling is None else engine.draft_draws
        options = TREE if kind == "tree" else HeadOptions()
        options = replace(options, sampling=sampling, draws=draws)
        head = graphs.head_drafter(loaded[level], tables, MAX_NEW, options, policy)
    party = LocalSpeculator(
        parse(name, 0), there.drafter, tables, loaded, {},
        max_new_tokens=MAX_NEW, max_prompt=longest, max_gap_drafts=0, head=head,
    )  # fmt: skip
    return engine, party
