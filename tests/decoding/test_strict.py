"""One row shape: reduced precision rounds alike whatever is drafted, and nothing is excused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.decoding.test_engine import Scripted
from tests.decoding.test_unread import Branching as UnreadTree
from tests.decoding.test_unread import Scripted as Unread
from xsd import bench
from xsd.bench import BenchItem
from xsd.decoding.accept import Draft
from xsd.decoding.config import DecodingConfig
from xsd.decoding.engine import Engine
from xsd.decoding.measure import measure_passes
from xsd.decoding.speculator import Speculator
from xsd.decoding.strategies import parse
from xsd.errors import XsdError
from xsd.pairs.base import ModelPair, Scored
from xsd.pairs.cache import KVCache
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.types import Trace

MAX_NEW, ROWS = 24, 6


class Recorded(Engine):
    """Keeps the verifier's states of what was said."""

    def answer(
        self, item: BenchItem, script: Speculator | None = None, gamma: int = 0
    ) -> tuple[list[int], Float[Tensor, "tokens Dv"]]:
        """What was said, and the state behind every token of it but the first."""
        self.kept: list[Tensor] = []
        media, question = item.media, item.sample.question
        if script is None:
            decoded = self.plain(media, question)
        else:
            decoded = self.speculate(media, question, script, gamma)
        return decoded.token_ids, torch.cat(self.kept)

    def _steps(self, tokens: list[int], count: int) -> Float[Tensor, "n Dv"]:
        self.kept.append(super()._steps(tokens, count))
        return self.kept[-1]

    def _verify(self, tokens: list[int], draft: Draft) -> tuple[Float[Tensor, "m Dv"], list[int]]:
        states, path = super()._verify(tokens, draft)
        self.kept.append(states)
        return states, path

    def _unread_cycle(self, *given: Any) -> Float[Tensor, "n Dv"]:
        self.kept.append(super()._unread_cycle(*given))
        return self.kept[-1]


class Branching(Scripted):
    """Every draft is a tree: the script's chain with a wrong sibling before each of its tokens."""

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        drafted: list[int] = []
        parents: list[int] = []
        parent = -1
        for token in super().propose(tokens, states, gamma).tokens:
            drafted += [(token + 2) % 1024, token]
            parents += [parent, parent]
            parent = len(drafted) - 1
        return Draft(drafted, parents)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(
    scope="module",
    params=[
        "bf16 cpu",
        "4bit cpu",
        pytest.param("bf16 cuda", marks=needs_gpu),
        pytest.param("4bit cuda", marks=needs_gpu),
    ],
)
def rough(request: pytest.FixtureRequest) -> ModelPair:
    quant, device = request.param.split()
    return load_pair(PairConfig(quant=quant, device=device))


def test_states_are_the_plain_ones_bit_by_bit(rough: ModelPair, items: list[BenchItem]) -> None:
    longest = bench.longest_prompt(rough, items)
    strict = Recorded(rough.verifier, MAX_NEW, longest, strict_rows=ROWS)
    loose = Recorded(rough.verifier, MAX_NEW, longest)
    num_loose = 0
    for item in items:
        (said, plain), (said_loosely, plain_loose) = strict.answer(item), loose.answer(item)
        assert len(plain) == len(said) - 1
        for period, gap, gamma in ((0, 0, 5), (2, 0, 3), (3, 40, 5), (0, 3, 2), (1, 1, 4)):
            drafted = strict.answer(item, Scripted(said, period, gap), gamma)
            assert drafted[0] == said and torch.equal(drafted[1], plain)
            apart = loose.answer(item, Scripted(said_loosely, period, gap), gamma)
            num_loose += not torch.equal(apart[1], plain_loose)
        device = rough.verifier.stack.device
        drafted = strict.answer(item, Unread(said, 0.2, device), 4)
        assert drafted[0] == said and torch.equal(drafted[1], plain)
    # A GPU's own kernels round alike for any number of rows at this size; a CPU's library does not.
    if rough.verifier.stack.device.type == "cpu":
        assert num_loose, "passes of many shapes round alike here: the test shows nothing"


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("rows", [ROWS, 23])
def test_trees_that_nobody_has_read_say_the_same(
    rows: int, rate: float, rough: ModelPair, items: list[BenchItem]
) -> None:
    """Of their states the last bit may differ, for their rows lie elsewhere in the cache."""
    engine = Engine(rough.verifier, MAX_NEW, bench.longest_prompt(rough, items), strict_rows=rows)
    device, num_held = rough.verifier.stack.device, 0
    for item in items:
        asked = item.media, item.sample.question
        said = engine.plain(*asked).token_ids
        answer = engine.speculate(*asked, UnreadTree(said, rate, device), 4)
        assert answer.token_ids == said
        num_held += sum(answer.cycle_accepted)
    assert num_held


def test_every_pass_has_the_shape(
    pair: ModelPair, items: list[BenchItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain steps, chains, trees, the gap and the measured costs; whatever the drafts' length."""
    engine = Engine(pair.verifier, MAX_NEW, bench.longest_prompt(pair, items), strict_rows=ROWS)
    media, question = items[0].media, items[0].sample.question
    said = engine.plain(media, question).token_ids
    loose = Engine(pair.verifier, MAX_NEW, bench.longest_prompt(pair, items))
    assert loose.plain(media, question).token_ids == said
    shapes: list[tuple[int, int]] = []
    read = pair.verifier.read

    def spied(ids: Sequence[int], cache: KVCache) -> Scored:
        shapes.append((len(ids), cache.window(len(ids))[0].keys.shape[2]))
        return read(ids, cache)

    monkeypatch.setattr(pair.verifier, "read", spied)
    assert engine.plain(media, question).token_ids == said
    assert len(shapes) == len(said) - 1
    for script in (Scripted(said, 3, 40), Scripted(said, 0, 2), Branching(said, 4, 0)):
        for gamma in (0, 1, 5, 9):
            assert engine.speculate(media, question, script, gamma).token_ids == said
    costs = measure_passes(engine, media, question, repeats=1)
    assert len(costs.verify_ms) == ROWS
    assert {rows for rows, _ in shapes} == {ROWS}
    assert len({columns for _, columns in shapes}) == 1


def test_a_difference_is_not_excused(
    rough: ModelPair,
    items: list[BenchItem],
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The benchmark's answers are equal, and where one is made to differ, nobody asks for ties."""
    monkeypatch.setattr(bench, "is_near_tie", lambda *_: pytest.fail("near ties were asked for"))
    config = DecodingConfig(max_new_tokens=12, overlap="inline", max_gap_drafts=6, strict=True)
    strategies = [parse(n, 3) for n in ("vl_baseline", "E1_decode", "X1+E3", "drafter+VL", "text")]

    def traces() -> list[Trace]:
        records = list(
            bench.run(
                rough, PairConfig(quant=rough.quant, device="cpu"), items[:2], strategies, adapters,
                {}, config, repeats=1, warmup=0, timed=False,
            )
        )  # fmt: skip
        found = [record for record in records if isinstance(record, Trace)]
        assert len(found) == 2 * len(strategies), records
        return found

    assert all(trace.first_difference is None for trace in traces())
    speculate = Engine.speculate

    def wrong(self: Engine, *args: object) -> object:
        decoded = speculate(self, *args)  # type: ignore[arg-type]
        decoded.token_ids[-1] += 1
        return decoded

    monkeypatch.setattr(Engine, "speculate", wrong)
    spoilt = [trace for trace in traces() if trace.strategy != "vl_baseline"]
    assert not any(trace.lossless or trace.near_tie for trace in spoilt)


def test_eight_bits_are_refused(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    records = bench.run(
        replace(pair, quant="8bit"), PairConfig(device="cpu"), items, [parse("vl_baseline", 0)],
        adapters, {}, DecodingConfig(strict=True), repeats=1, warmup=0,
    )  # fmt: skip
    with pytest.raises(XsdError, match="strict: 8-bit layers"):
        next(records)
