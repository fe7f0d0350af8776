"""A drafter that goes on: whatever it has drafted before, it drafts what a fresh one would."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from xsd.adapters import checkpoint
from xsd.adapters.base import Adapter
from xsd.adapters.compiled import CompiledCache
from xsd.adapters.rows import StepInputs
from xsd.bench import BenchItem, longest_prompt
from xsd.decoding.ahead import Board, CoupledDrafter
from xsd.decoding.draft import HeadDrafter
from xsd.decoding.policy import Policy
from xsd.decoding.reader import DrafterReader, ReaderMemory
from xsd.decoding.tables import VerifierTables
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import ModelPair

MAX_NEW = 24


def new_reader(pair: ModelPair, items: list[BenchItem]) -> DrafterReader:
    memory = ReaderMemory.new(pair.drafter, MAX_NEW, longest_prompt(pair, items))
    reader = DrafterReader(pair.drafter, memory)
    reader.begin(items[0].media, items[0].sample.question)
    return reader


def visual_of(pair: ModelPair, adapter: Adapter, item: BenchItem) -> torch.Tensor | None:
    if adapter.memory != "visual":
        return None
    return pool_visual(pair.verifier.visual_tokens(pair.verifier.pixels(item.media)))


def coupled(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path], name: str
) -> CoupledDrafter:
    adapter = checkpoint.load(adapters[name])[0].eval()
    tables = VerifierTables.of(pair.verifier)
    drafter = CoupledDrafter(new_reader(pair, items), adapter, tables, MAX_NEW)
    drafter.begin(visual_of(pair, adapter, items[0]))
    return drafter


@pytest.mark.parametrize("name", ["L1", "L4", "X1"])
@torch.inference_mode()
def test_it_drafts_on_behind_whatever_is_said(
    name: str, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    going = coupled(pair, items, adapters, name)
    going.extend(5)
    first = list(going.tokens)
    # As drafted, and less of it; then otherwise, inside and beyond what was drafted.
    for said in (first[:3], first, [*first[:2], 300], [*first[:2], 300, 301, 302, 303, 304]):
        going.follow(said)
        assert going.tokens[: len(said)] == said
        fresh = coupled(pair, items, adapters, name)
        fresh.follow(said)
        size = len(going.tokens) + 3
        for drafter in (going, fresh):
            while len(drafter.tokens) < size and not drafter.is_done:
                drafter.extend(1)
        assert going.tokens == fresh.tokens


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("name", ["L4", "X1"])
@torch.inference_mode()
def test_a_chain_is_its_steps_one_by_one(
    name: str, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    whole, stepped = (coupled(pair, items, adapters, name) for _ in range(2))
    adapter = checkpoint.load(adapters[name])[0].eval()
    reader, tables = new_reader(pair, items), VerifierTables.of(pair.verifier)
    visual = visual_of(pair, adapter, items[0])
    cache = adapter.new_cache(1, MAX_NEW, None if visual is None else visual[None])
    said: list[int] = []
    sure: list[float] = []
    for position in range(8):
        rows = StepInputs(drafter=reader.states(said, position, position + 1)[None])
        out = adapter.step(rows, cache)
        said += tables.choose(out)
        sure.append(float(torch.softmax(tables.score(out), -1).max()))
        stepped.extend(1)
    whole.extend(8)
    assert isinstance(cache, CompiledCache)
    assert whole.tokens == stepped.tokens == said
    assert whole.confidence == stepped.confidence == pytest.approx(sure, rel=1e-4)


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("name", ["L5", "L5F", "E2"])
@torch.inference_mode()
def test_a_heads_compiled_chain_is_its_steps_one_by_one(
    name: str, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    head, tables = checkpoint.load(adapters[name])[0].eval(), VerifierTables.of(pair.verifier)
    question = items[0].sample.question
    random = torch.Generator().manual_seed(0)
    states = torch.randn(12, pair.verifier.width, generator=random)
    found = []
    for is_chain in (True, False):
        drafter = HeadDrafter(head, tables, MAX_NEW)
        # A property that is cached: without it every step is a call of its own.
        drafter.__dict__.update({} if is_chain else {"vocabulary": None})
        drafter.begin(question, None, new_reader(pair, items))
        said = [300, 301]
        drafts = []
        for kept, fresh in ((2, 2), (3, 3), (1, 2)):
            chain = drafter.propose(said, states[len(said) - fresh : len(said)], 4).tokens
            drafts.append(chain)
            # Some of it holds, and the verifier's own token follows.
            said = [*said, *chain[: kept - 1], 310 + kept]
        found.append(drafts)
    assert found[0] == found[1]


class Shallow(Policy):
    def whole_depth(self, limit: int) -> int:
        return min(limit, 2)


@torch.inference_mode()
def test_a_head_that_reads_the_drafter_drafts_as_deep_as_its_policy_says(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    head, tables = checkpoint.load(adapters["E2"])[0].eval(), VerifierTables.of(pair.verifier)
    states = torch.randn(2, pair.verifier.width, generator=torch.Generator().manual_seed(0))
    for policy, depth in ((Policy(), 5), (Shallow(), 2)):
        drafter = HeadDrafter(head, tables, MAX_NEW, policy=policy)
        drafter.begin(items[0].sample.question, None, new_reader(pair, items))
        assert len(drafter.propose([300, 301], states, 5)) == depth


def test_a_verifier_sees_only_what_follows_its_own_words(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    expected = coupled(pair, items, adapters, "L4")
    with torch.inference_mode():
        expected.extend(6)
    board, over = Board.of_threads(MAX_NEW), Event()
    going = coupled(pair, items, adapters, "L4")

    def work() -> None:
        with torch.inference_mode():
            board.draft(going, 6, 4, over.is_set, lambda: time.sleep(0))

    def wait_for(count: int) -> list[int]:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if board.is_current and len(board.drafts(count)) == count:
                return board.drafts(count)
            time.sleep(0.001)
        raise AssertionError("the drafts did not come")

    thread = Thread(target=work)
    thread.start()
    try:
        assert wait_for(6) == expected.tokens
        board.tell(expected.tokens[:2])
        # As it was drafted: nobody needs to be asked.
        assert board.is_current and board.drafts(3) == expected.tokens[2:5]
        board.tell([*expected.tokens[:2], 300])
        fresh = coupled(pair, items, adapters, "L4")
        fresh.follow([*expected.tokens[:2], 300])
        with torch.inference_mode():
            fresh.extend(2)
        assert wait_for(2) == fresh.tokens[3:5]
        # After a detour too, what was drafted holds when it is said.
        board.tell(fresh.tokens[:4])
        assert board.is_current and board.drafts(1) == fresh.tokens[4:5]
    finally:
        over.set()
        thread.join()
