"""Captured chains against the chains of ``HeadDrafter``, and decoding on a GPU."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xsd import bench
from xsd.adapters import checkpoint
from xsd.bench import BenchItem
from xsd.decoding import coupled_graphs, graphs
from xsd.decoding.ahead import CoupledDrafter
from xsd.decoding.draft import (
    DrafterReader,
    HeadDrafter,
    HeadOptions,
    ReaderMemory,
    VerifierTables,
)
from xsd.decoding.engine import Engine
from xsd.decoding.policy import Adaptive, Costs, Policy
from xsd.decoding.rote import Rote
from xsd.decoding.speculator import LocalSpeculator
from xsd.decoding.strategies import parse
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig

MAX_NEW = 30
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Replayed:
    """A capture where there is no GPU: the work is run again, into the tensor of the first run."""

    made = 0

    def __init__(self, work: Callable[[], Any], lane: object) -> None:
        Replayed.made += 1
        self._work, self.result = work, work()

    def replay(self) -> Tensor:
        return self.result.copy_(self._work())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        Replayed.made = 0
        monkeypatch.setattr(graphs, "Capture", Replayed)
        monkeypatch.setattr(graphs, "Lane", lambda device: None)
    return torch.device(request.param)


def on(device: torch.device, pair: ModelPair) -> ModelPair:
    return pair if device.type == "cpu" else load_pair(PairConfig(device="cuda"))


@pytest.mark.parametrize("level", ["B1", "E1", "E3", "text"])
def test_captured_chains_are_the_heads_own(
    level: str, device: torch.device, pair: ModelPair, adapters: dict[str, Path]
) -> None:
    verifier = on(device, pair).verifier
    head = checkpoint.load(adapters[level])[0].to(device).eval()
    tables = VerifierTables.of(verifier)
    policy = Adaptive(Costs((1.0,) * 24, 1.0))
    policy.learn_drafting(0.0, 0.0)
    plain = HeadDrafter(head, tables, MAX_NEW, None, policy)
    captured = graphs.CapturedHead(head, tables, MAX_NEW)
    draw = torch.Generator().manual_seed(0)
    for sample, num_visual in enumerate((9, 9, 5)):
        visual = torch.randn(num_visual, verifier.width, generator=draw).to(device)
        for party in (plain, captured):
            party.begin("?", visual, None)
        tokens: list[int] = []
        # Rows of cycles that accepted 18 (after a gap), 3, 0, 3 drafts; the last is cut short.
        for fresh, gamma in ((19, 4), (4, 4), (1, 4), (4, 2)):
            tokens += torch.randint(3, 200, (fresh,), generator=draw).tolist()
            states = torch.randn(fresh, verifier.width, generator=draw).to(device)
            own = plain.propose(tokens, states, gamma)
            found = captured.propose(tokens, states, gamma)
            # Where a chain says the end, what it drafts beyond is not looked at.
            size = len(own)
            assert found.tokens[:size] == own.tokens and len(found) == gamma, sample
            assert found.confidence is not None
            assert found.confidence[:size] == pytest.approx(own.confidence, rel=1e-3)
    if device.type == "cpu":
        # (4, 4), (1, 4), (4, 2); again for visual vectors of another number.
        assert Replayed.made == (6 if level == "E3" else 3)


@pytest.mark.parametrize("level", ["L5", "L5F", "E2"])
@torch.inference_mode()
def test_a_drafter_that_reads_along_in_the_capture_gives_the_heads_own_chains(
    level: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    there = on(device, pair)
    head = checkpoint.load(adapters[level])[0].to(device).eval()
    tables = VerifierTables.of(there.verifier)
    plain, captured = HeadDrafter(head, tables, MAX_NEW), graphs.CapturedHead(head, tables, MAX_NEW)
    longest = bench.longest_prompt(pair, items)
    readers = [
        DrafterReader(there.drafter, ReaderMemory.new(there.drafter, MAX_NEW, longest))
        for _ in range(2)
    ]
    draw = torch.Generator().manual_seed(0)
    for item in items[:2]:
        for party, reader in zip((plain, captured), readers, strict=True):
            reader.begin(item.media, item.sample.question)
            # As a gap leaves it: behind tokens that were not said.
            reader.states([300, 301, 302], 0, 4)
            party.begin(item.sample.question, None, reader)
        tokens: list[int] = []
        for fresh, gamma in ((19, 4), (4, 4), (1, 4), (3, 2)):
            tokens += torch.randint(3, 200, (fresh,), generator=draw).tolist()
            states = torch.randn(fresh, there.verifier.width, generator=draw).to(device)
            own = plain.propose(tokens, states, gamma)
            found = captured.propose(tokens, states, gamma)
            assert found.tokens[: len(own)] == own.tokens and len(found) == gamma
    if device.type == "cpu":
        # Those of few rows, once: another sample replays them.
        assert Replayed.made == 3


@pytest.mark.parametrize("level", ["L2", "L4", "X1"])
@torch.inference_mode()
def test_captured_coupled_drafting_is_the_adapters_own(
    level: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(coupled_graphs, "Capture", graphs.Capture)
    monkeypatch.setattr(coupled_graphs, "Lane", graphs.Lane)
    there = on(device, pair)
    adapter = checkpoint.load(adapters[level])[0].to(device).eval()
    tables = VerifierTables.of(there.verifier)
    longest = bench.longest_prompt(pair, items)
    parties: list[CoupledDrafter] = []
    for kind in (CoupledDrafter, coupled_graphs.CapturedCoupled):
        reader = DrafterReader(there.drafter, ReaderMemory.new(there.drafter, MAX_NEW, longest))
        parties.append(kind(reader, adapter, tables, MAX_NEW))
    for number, item in enumerate(items[:2]):
        visual = torch.randn(9, there.verifier.width).to(device)
        for party in parties:
            party._reader.begin(item.media, item.sample.question)
            party.begin(visual if adapter.memory == "visual" else None)
            if number:
                # Something was said before anything was drafted.
                party.follow([300, 301])
        for count in (1, 3, 1, 2):
            said = [*parties[0].tokens[: len(parties[0].tokens) // 2], 300, 301 + count]
            for party in parties:
                party.extend(count)
                # Some of it holds, and the verifier's own tokens follow.
                party.follow(said)
                party.extend(2)
            assert parties[0].tokens == parties[1].tokens
            assert parties[0].confidence == pytest.approx(parties[1].confidence, abs=1e-4)
    if device.type == "cpu":
        # The prompt alone, one token, two, three; again for nothing.
        assert Replayed.made <= 5


@pytest.mark.parametrize("level", ["E1", "E3"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_captured_trees_are_the_heads_own(
    level: str, width: int, is_adaptive: bool, device: torch.device, pair: ModelPair,
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from xsd.decoding import tree_graphs

    monkeypatch.setattr(tree_graphs, "Capture", graphs.Capture)
    verifier = on(device, pair).verifier
    head = checkpoint.load(adapters[level])[0].to(device).eval()
    tables = VerifierTables.of(verifier)
    options = HeadOptions(tree_width=width, tree_nodes=10)
    policy = Policy()
    if is_adaptive:
        policy = Adaptive(Costs((1.0,) * 24, 1.0))
        policy.learn_drafting(0.0, 0.0)
    plain = HeadDrafter(head, tables, MAX_NEW, options, policy)
    captured = graphs.head_drafter(head, tables, MAX_NEW, options, policy)
    if device.type == "cpu":
        captured = tree_graphs.CapturedTreeHead(head, tables, MAX_NEW, options, policy)
    assert isinstance(captured, tree_graphs.CapturedTreeHead)
    draw = torch.Generator().manual_seed(0)
    for num_visual in (9, 9, 5):
        visual = torch.randn(num_visual, verifier.width, generator=draw).to(device)
        for party in (plain, captured):
            party.begin("?", visual, None)
        tokens: list[int] = []
        for fresh, gamma in ((19, 4), (4, 4), (1, 4), (4, 1)):
            tokens += torch.randint(3, 200, (fresh,), generator=draw).tolist()
            states = torch.randn(fresh, verifier.width, generator=draw).to(device)
            expected = plain.propose(tokens, states, gamma)
            found = captured.propose(tokens, states, gamma)
            # A tree with one branch is a chain, which need not name its parents.
            parents = expected.parents or list(range(-1, len(expected) - 1))
            assert (found.tokens, found.parents) == (expected.tokens, parents)
            assert (found.confidence is None) == (not is_adaptive)
            if is_adaptive:
                assert found.confidence == pytest.approx(expected.confidence, rel=1e-3)


def test_heads_that_do_not_branch_are_captured_and_gap_adapters_are_not(
    adapters: dict[str, Path],
) -> None:
    levels = ("E1", "E2", "L5", "text", "L4", "X1")
    heads = {level: checkpoint.load(adapters[level])[0] for level in levels}
    assert [graphs.fits_captures(head, HeadOptions()) for head in heads.values()] == [
        True, True, True, True, False, False,
    ]  # fmt: skip
    branching = HeadOptions(tree_width=2)
    assert not graphs.fits_captures(heads["E1"], branching)
    assert [graphs.fits_trees(heads[level], branching) for level in ("E1", "E2")] == [True, False]


@needs_gpu
def test_a_gpu_says_what_a_cpu_says(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    there = load_pair(PairConfig(device="cuda"))
    longest = bench.longest_prompt(pair, items)
    engines = [Engine(p.verifier, MAX_NEW, longest) for p in (pair, there)]
    for item in items:
        asked = item.media, item.sample.question
        here, gpu = (engine.plain(*asked).token_ids for engine in engines)
        assert here == gpu


class Scripted(Rote):
    """Drafts an answer that it knows, each token wrong now and then, and leaves it on the device;
    behind the answer's end it goes on."""

    def __init__(self, answer: Sequence[int], rate: float, device: torch.device) -> None:
        self._answer, self._rate, self._device = list(answer), rate, device
        self._random = random.Random(0)

    def unread(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Tensor:
        rest = [*self._answer[len(tokens) :], *range(5, 5 + gamma)][:gamma]
        ids = [t if self._random.random() >= self._rate else (t + 1) % 1024 for t in rest]
        return torch.tensor([ids, [0.5] * gamma], dtype=torch.double, device=self._device)


def unfused(verifier: Decoder, longest: int) -> Engine:
    """Cycles that are made one by one, as they are on a GPU."""
    engine = Engine(verifier, MAX_NEW, longest)
    engine._loop, engine._reads_late = None, True
    return engine


@pytest.mark.parametrize("gamma", [1, 3, 8])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_drafts_that_are_verified_unread_change_no_token(
    rate: float, gamma: int, device: torch.device, pair: ModelPair, items: list[BenchItem]
) -> None:
    verifier = on(device, pair).verifier
    engine = unfused(verifier, bench.longest_prompt(pair, items))
    for item in items:
        asked = item.media, item.sample.question
        plain = engine.plain(*asked).token_ids
        party = Scripted(plain, rate, device)
        for policy in (Policy(), Adaptive(Costs((1.0,) * 24, 1.0))):
            answer = engine.speculate(*asked, party, gamma, policy)
            assert answer.token_ids == plain
            accepted, drafted = answer.cycle_accepted, answer.cycle_drafted
            pairs = list(zip(accepted, drafted, strict=True))
            assert pairs and all(a <= d <= gamma for a, d in pairs)
            assert (sum(accepted) > 0) == (rate < 1.0)
            if rate == 0.0:
                assert accepted == drafted
            assert answer.parts["drafting"] > 0.0


def test_drafts_are_read_first_where_that_may_save_rows() -> None:
    assert not Policy().reads_first(8)
    costs = Costs((1.0, 1.0, 1.0, 1.5), 1.0, read_ms=0.1)
    assert [Adaptive(costs).reads_first(size) for size in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("level", ["B1", "E1", "E2", "E3"])
def test_a_head_whose_drafts_are_not_read_decodes_as_one_whose_drafts_are(
    level: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    there = on(device, pair)
    longest = bench.longest_prompt(pair, items)
    engine, head = unfused(there.verifier, longest), checkpoint.load(adapters[level])[0]
    head = head.to(device).eval()
    tables = VerifierTables.of(there.verifier)
    counts = []
    for kind in (HeadDrafter, graphs.CapturedHead):
        party = LocalSpeculator(
            parse(f"{level}_decode", 0), there.drafter, tables, {level: head}, {},
            max_new_tokens=MAX_NEW, max_prompt=longest, max_gap_drafts=0,
            head=kind(head, tables, MAX_NEW),
        )  # fmt: skip
        for item in items:
            asked = item.media, item.sample.question
            answer = engine.speculate(*asked, party, 3)
            assert answer.token_ids == engine.plain(*asked).token_ids
            counts.append((answer.cycle_drafted, answer.cycle_accepted))
    assert counts[:3] == counts[3:]


@needs_gpu
def test_a_cycle_waits_once_for_the_device(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    device = torch.device("cuda")
    there = load_pair(PairConfig(device="cuda"))
    longest = bench.longest_prompt(pair, items)
    engine, head = Engine(there.verifier, MAX_NEW, longest), checkpoint.load(adapters["E1"])[0]
    tables = VerifierTables.of(there.verifier)
    party = LocalSpeculator(
        parse("E1_decode", 0), there.drafter, tables, {"E1": head.to(device).eval()}, {},
        max_new_tokens=MAX_NEW, max_prompt=longest, max_gap_drafts=0,
    )  # fmt: skip
    asked = items[0].media, items[0].sample.question
    waits = []
    for max_new in (MAX_NEW // 2, MAX_NEW):
        engine.max_new_tokens = max_new
        for _ in range(3):  # captures are made
            answer = engine.speculate(*asked, party, 4)
        assert not answer.made_captures
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answer = engine.speculate(*asked, party, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append((len(caught), len(answer.cycle_drafted)))
    (few, short), (many, long) = waits
    # A last token, for which alone there is room, is a step without drafts.
    assert long > short and abs(many - few - (long - short)) <= 1
