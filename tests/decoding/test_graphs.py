"""Captured chains against the chains of ``HeadDrafter``, and decoding on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoding.conftest import Replayed, needs_gpu, on
from xsd import bench
from xsd.adapters import checkpoint
from xsd.bench import BenchItem
from xsd.decoding import coupled_graphs, graphs, tree_graphs
from xsd.decoding.accept import Sampling
from xsd.decoding.ahead import CoupledDrafter
from xsd.decoding.costs import Costs
from xsd.decoding.draft import HeadDrafter, HeadOptions
from xsd.decoding.draws import Draws
from xsd.decoding.engine import Engine
from xsd.decoding.policy import Adaptive, Policy
from xsd.decoding.reader import DrafterReader, ReaderMemory
from xsd.decoding.tables import VerifierTables
from xsd.pairs.base import ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig

MAX_NEW = 30


@pytest.mark.usefixtures("whole_weights")
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
        # (5, 4), the rows before being read first, (4, 4), (1, 4), (3, 2); again for visual vectors
        # of another number.
        assert Replayed.made == (8 if level == "E3" else 4)


@pytest.mark.parametrize("level", ["B1", "E1", "E3"])
@pytest.mark.parametrize("sampling", [Sampling(3.0), Sampling(3.0, 0.8)], ids=["all", "top-p"])
def test_captured_drawn_chains_are_the_heads_own(
    level: str, sampling: Sampling, device: torch.device, pair: ModelPair,
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    """With the same random numbers; a capture that is launched again takes those of then."""
    verifier = on(device, pair).verifier
    head = checkpoint.load(adapters[level])[0].to(device).eval()
    tables, draws = VerifierTables.of(verifier), Draws("drafts", 0, device)
    options = HeadOptions(sampling=sampling, draws=draws)
    policy = Adaptive(Costs((1.0,) * 24, 1.0))
    policy.learn_drafting(0.0, 0.0)
    plain = HeadDrafter(head, tables, MAX_NEW, options, policy)
    captured = graphs.head_drafter(head, tables, MAX_NEW, options, policy)
    if device.type == "cpu":
        captured = graphs.CapturedHead(head, tables, MAX_NEW, options, policy)
    assert isinstance(captured, graphs.CapturedHead)
    draw, all_found = torch.Generator().manual_seed(0), set()
    visual = torch.randn(9, verifier.width, generator=draw).to(device)
    for name in ("one", "one", "another"):
        draws.name = name
        given = torch.Generator().manual_seed(1)
        for party in (plain, captured):
            party.begin("?", visual, None)
        tokens: list[int] = []
        for fresh, gamma in ((19, 4), (4, 4), (1, 4), (4, 2)):
            tokens += torch.randint(3, 200, (fresh,), generator=given).tolist()
            states = torch.randn(fresh, verifier.width, generator=given).to(device)
            own = plain.propose(tokens, states, gamma)
            found = captured.unread(tokens, states, gamma)
            assert found is not None and found.q is not None
            assert found.q.shape == (gamma, tables.vocab_size)
            read, size = found.read(), len(own)
            assert read.tokens[:size] == own.tokens and len(read) == gamma
            assert read.q is not None and own.q is not None
            torch.testing.assert_close(read.q[:size], own.q, rtol=1e-3, atol=1e-6)
            assert read.confidence is not None
            assert read.confidence[:size] == pytest.approx(own.confidence, rel=1e-3)
            all_found.add((len(tokens), *read.tokens))
    # Drawn anew for another answer, and for the same again as before.
    assert len(all_found) == 8


@pytest.mark.usefixtures("whole_weights")
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
        # One a shape: another sample replays them.
        assert Replayed.made == 4


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("level", ["L2", "L4", "X1"])
@torch.inference_mode()
def test_captured_coupled_drafting_is_the_adapters_own(
    level: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    there = on(device, pair)
    parties = coupled_parties(level, there, device, items, adapters)
    for number, item in enumerate(items[:2]):
        visual = torch.randn(9, there.verifier.width).to(device)
        for party in parties:
            begin_coupled(party, item, visual)
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
        # One for how many tokens are new and how many are drafted; again for nothing.
        assert Replayed.made == 6


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("level", ["L4", "X1"])
@torch.inference_mode()
def test_coupled_drafts_that_are_left_on_the_device_are_those_that_are_read(
    level: str, device: torch.device, pair: ModelPair, items: list[BenchItem],
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    read, left = coupled_parties(level, on(device, pair), device, items, adapters)
    assert isinstance(left, coupled_graphs.CapturedCoupled)
    said: list[int] = []
    for num_held, count in ((0, 3), (2, 4), (0, 2), (4, 4)):
        for party in (read, left):
            party.follow(said)
        unread = left.unread(len(said), count)
        assert unread is not None and unread.tree is None
        found, choices = unread.read_with(torch.arange(count + 1, device=device))
        assert choices == list(range(count + 1))
        read.extend(len(said) + count - len(read.tokens))
        # Where the one is at an end, the other has drafted on.
        own = read.tokens[len(said) : len(said) + count]
        assert found.tokens[: len(own)] == own and len(found) == count
        assert found.confidence is not None
        sure = read.confidence[len(said) : len(said) + count]
        assert found.confidence[: len(own)] == pytest.approx(sure, abs=1e-4)
        said = [*said, *found.tokens[:num_held], 300 + num_held]
    # What has been read already, as in the gap, need not be drafted again.
    for party in (read, left):
        party.follow(said)
        party.extend(2)
    known = left.tokens[len(said) :]
    assert len(known) == 2 and left.unread(len(said), 2) is None
    unread = left.unread(len(said), 5)
    assert unread is not None
    read.extend(3)
    assert unread.read().tokens == read.tokens[len(said) :] and left.tokens[len(said) :] == known


def coupled_parties(
    level: str, there: ModelPair, device: torch.device, items: list[BenchItem],
    adapters: dict[str, Path],
) -> list[CoupledDrafter]:  # fmt: skip
    """Step by step, and captured, with a drafter each; a sample has begun."""
    adapter = checkpoint.load(adapters[level])[0].to(device).eval()
    tables, longest = VerifierTables.of(there.verifier), bench.longest_prompt(there, items)
    parties: list[CoupledDrafter] = []
    for kind in (CoupledDrafter, coupled_graphs.CapturedCoupled):
        reader = DrafterReader(there.drafter, ReaderMemory.new(there.drafter, MAX_NEW, longest))
        parties.append(kind(reader, adapter, tables, MAX_NEW))
    visual = torch.randn(9, there.verifier.width).to(device)
    for party in parties:
        begin_coupled(party, items[0], visual)
    return parties


def begin_coupled(party: CoupledDrafter, item: BenchItem, visual: Tensor) -> None:
    party._reader.begin(item.media, item.sample.question)
    party.begin(visual if party._adapter.memory == "visual" else None)


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("level", ["E1", "E3"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_captured_trees_are_the_heads_own(
    level: str, width: int, is_adaptive: bool, device: torch.device, pair: ModelPair,
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    verifier = on(device, pair).verifier
    head = checkpoint.load(adapters[level])[0].to(device).eval()
    tables = VerifierTables.of(verifier)
    options = HeadOptions(tree_width=width, tree_nodes=10)
    policy = Policy()
    if is_adaptive:
        policy = Adaptive(Costs((1.0,) * 24, 1.0))
        policy.learn_drafting(0.0, 0.0)
        seen = torch.Generator().manual_seed(1)
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
            if is_adaptive:
                # Something else is known of every confidence by now.
                tried, held, *_ = policy.rule
                held[:] = torch.randint(9, (len(held),), generator=seen).numpy()
                tried[:] = held + torch.randint(9, (len(held),), generator=seen).numpy()
            expected = plain.propose(tokens, states, gamma)
            found = captured.propose(tokens, states, gamma)
            # A tree with one branch is a chain, which need not name its parents.
            parents = expected.parents or list(range(-1, len(expected) - 1))
            assert (found.tokens, found.parents) == (expected.tokens, parents)
            assert found.confidence is not None and found.depth == gamma
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
