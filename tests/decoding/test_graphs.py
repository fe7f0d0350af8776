"""Captured chains against the chains of ``HeadDrafter``, and decoding on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xsd import bench
from xsd.adapters import checkpoint
from xsd.bench import BenchItem
from xsd.decoding import graphs
from xsd.decoding.draft import HeadDrafter, HeadOptions, VerifierTables
from xsd.decoding.engine import Engine
from xsd.decoding.policy import Adaptive, Costs, Policy
from xsd.pairs.base import ModelPair
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


@pytest.mark.parametrize("level", ["B1", "E1", "E3"])
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


def test_what_reads_the_drafter_or_branches_is_not_captured(
    adapters: dict[str, Path],
) -> None:
    heads = {level: checkpoint.load(adapters[level])[0] for level in ("E1", "E2", "L5", "L4")}
    assert [graphs.fits_captures(head, HeadOptions()) for head in heads.values()] == [
        True, False, False, False,
    ]  # fmt: skip
    assert not graphs.fits_captures(heads["E1"], HeadOptions(tree_width=2))


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
