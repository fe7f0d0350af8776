"""An answer that fails leaves nothing behind: the next one is as if there had been none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import numpy as np
import pytest

from tests.decoding.test_engine import Branching
from xsd import bench
from xsd.bench import Bench, BenchItem
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.decoded import Decoded
from xsd.decoding.engine import Engine
from xsd.decoding.loop import CompiledLoop
from xsd.decoding.overlap import DrafterProcess
from xsd.decoding.strategies import parse
from xsd.errors import XsdError
from xsd.pairs.base import Decoder, Media, ModelPair
from xsd.pairs.config import PairConfig
from xsd.types import Strategy, Trace

NAMES = ["L4+VL", "X1+VL", "L4+VL:free", "X1+E3", "X1+drafter", "E2_decode"]
STRATEGIES = {name: parse(name, 3) for name in (BASELINE, *NAMES)}
MAX_GAP_DRAFTS = 8
OF_THE_DRAFTER = "division by zero"
"""What ``unreadable`` images raise in the drafter's image processor."""
PLACES = {
    "vision": lambda party: [(type(party.pair.verifier), "pixels")],
    "prefill": lambda party: [
        (type(party.pair.verifier), name) for name in ("prefill", "forward")
    ],
    "decode": lambda party: [(Engine, "_pass"), (CompiledLoop, "run"), (CompiledLoop, "verify")],
}  # fmt: skip


def within(seconds: float, work: Callable[[], Decoded]) -> Decoded:
    """What ``work`` returns or raises; a failed test where it hangs."""
    found: list[Decoded | Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - raised below
            found.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"no answer within {seconds} s"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def decode(party: Bench, item: BenchItem, strategy: Strategy) -> Decoded:
    return within(30, lambda: party.decode(item, strategy))


@pytest.fixture(scope="module", params=["inline", "stream", "process"])
def party(
    request: pytest.FixtureRequest,
    pair: ModelPair,
    items: list[BenchItem],
    adapters: dict[str, Path],
) -> Iterator[Bench]:
    config = DecodingConfig(
        max_new_tokens=20, overlap=request.param, max_gap_drafts=MAX_GAP_DRAFTS, policy="fixed"
    )
    with ExitStack() as stack:
        strategies = list(STRATEGIES.values())
        yield Bench(stack, pair, PairConfig(device="cpu"), items, strategies, adapters, {}, config)


def check_next(party: Bench, items: list[BenchItem], strategy: Strategy) -> None:
    """The next answers are plain decoding's, and what is told of them is their own."""
    for item in (items[1], items[0]):
        plain = decode(party, item, STRATEGIES[BASELINE])
        found = decode(party, item, strategy)
        assert found.token_ids == plain.token_ids
        assert found.gap_accepted <= found.gap_drafted <= found.num_free <= MAX_GAP_DRAFTS
        assert len(found.cycle_accepted) == len(found.cycle_drafted)
        pairs = zip(found.cycle_accepted, found.cycle_drafted, strict=True)
        assert all(accepted <= drafted for accepted, drafted in pairs)
        assert next(span.what for span in found.timeline if span.lane == "drafter") == "prefill"
        for span in found.timeline:
            assert 0 <= span.start_ms <= span.end_ms <= found.total_ms, span
        if party.process is not None:
            assert not party.process.connection.poll(), "the pipe is a message behind"


def unreadable(item: BenchItem) -> BenchItem:
    """For the drafter; the verifier looks at other images."""
    return replace(item, media=Media([np.zeros((0, 8, 3), np.uint8)], item.media.frames))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_where_the_verifier_fails(
    name: str,
    place: str,
    party: Bench,
    items: list[BenchItem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("made up")

    with monkeypatch.context() as patched:
        for owner, method in PLACES[place](party):
            patched.setattr(owner, method, broken)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="made up"):
                decode(party, items[0], STRATEGIES[name])
    check_next(party, items, STRATEGIES[name])


@pytest.mark.parametrize("name", NAMES)
def test_where_the_drafter_fails(name: str, party: Bench, items: list[BenchItem]) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match=OF_THE_DRAFTER):
            decode(party, unreadable(items[0]), STRATEGIES[name])
    check_next(party, items, STRATEGIES[name])


def test_where_both_fail_the_first_error_is_told(
    party: Bench, items: list[BenchItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = STRATEGIES["X1+VL"]

    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("made up")

    with monkeypatch.context() as patched:
        patched.setattr(type(party.pair.verifier), "pixels", broken)
        # In one process the drafter is asked first.
        told = OF_THE_DRAFTER if party.config.overlap == "inline" else "^made up$"
        with pytest.raises(Exception, match=told):
            decode(party, unreadable(items[0]), strategy)
    check_next(party, items, strategy)


def test_a_sample_that_never_reached_the_process_is_not_waited_for(
    party: Bench, items: list[BenchItem]
) -> None:
    if party.process is None:
        pytest.skip("there is no process")
    media = items[0].media
    huge = replace(items[0], media=Media(media.event_images * 50, media.frames))
    with pytest.raises(AssertionError, match="larger than was said"):
        decode(party, huge, STRATEGIES["X1+VL"])
    check_next(party, items, STRATEGIES["X1+VL"])


def test_a_process_that_is_gone_is_told_sample_after_sample(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    config = DecodingConfig(max_new_tokens=4, overlap="process")
    strategies = [STRATEGIES[name] for name in (BASELINE, "X1+drafter")]
    with ExitStack() as stack:
        party = Bench(
            stack, pair, PairConfig(device="cpu"), items, strategies, adapters, {}, config
        )
        assert isinstance(party.process, DrafterProcess)
        party.process._process.kill()
        party.process._process.join()
        for _ in range(2):
            with pytest.raises(XsdError, match="the drafter process"):
                decode(party, items[0], strategies[1])
        assert decode(party, items[0], strategies[0]).token_ids


@pytest.mark.parametrize("what", ["an answer", "a timed pass"])
def test_a_pass_that_fails_leaves_its_shape_to_nobody(
    what: str, pair: ModelPair, items: list[BenchItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pair.verifier, 20, bench.longest_prompt(pair, items), strict_rows=32)
    asked: Any = items[0].media, items[0].sample.question
    plain = engine.plain(*asked).token_ids
    tree = Branching(plain, 0, 0)

    def broken(*_: object, **__: object) -> NoReturn:
        assert engine._cache.whole and (what != "an answer" or engine._cache.tree is not None)
        raise RuntimeError("made up")

    with monkeypatch.context() as patched:
        patched.setattr(type(pair.verifier), "read", broken)
        with pytest.raises(RuntimeError, match="made up"):
            if what == "an answer":
                engine.speculate(*asked, tree, 4)
            else:
                engine.timed_pass(3, engine._cache.length)()
    prefill = type(pair.verifier).prefill

    def watched(*given: Any) -> Any:
        assert not engine._cache.whole and engine._cache.tree is None
        return prefill(*given)

    monkeypatch.setattr(type(pair.verifier), "prefill", watched)
    assert engine.plain(*asked).token_ids == plain


def unseen_by(patched: pytest.MonkeyPatch, model: Decoder, unseen: list[BenchItem]) -> None:
    """Let a model fail at the media of these items."""
    pixels = type(model).pixels

    def broken(decoder: Decoder, media: Media) -> Any:
        if any(media is item.media for item in unseen):
            raise RuntimeError("made up\nand more")
        return pixels(decoder, media)

    patched.setattr(type(model), "pixels", broken)


@pytest.mark.parametrize("blind", ["drafter", "verifier"])
def test_an_item_that_fails_before_its_turn_is_counted_in_its_turn(
    blind: str,
    pair: ModelPair,
    items: list[BenchItem],
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where cores are chosen, costs are measured, or all is warmed up: others serve for that."""
    unseen_by(monkeypatch, getattr(pair, blind), items[:1])
    names = [BASELINE, "E1_decode", "X1+E3"]
    strategies = [STRATEGIES.get(name) or parse(name, 3) for name in names]
    config = DecodingConfig(max_new_tokens=8, overlap="inline", policy="fixed")
    records = list(
        bench.run(
            pair, PairConfig(device="cpu"), items, strategies, adapters, {}, config,
            repeats=1, warmup=2,
        )
    )  # fmt: skip
    failed = [record for record in records if isinstance(record, bench.Failure)]
    lost = BASELINE if blind == "verifier" else "X1+E3"
    assert failed == [bench.Failure(items[0].sample.key, lost, "RuntimeError: made up")]
    traces = [record for record in records if isinstance(record, Trace)]
    assert all(trace.modelled_ms is not None for trace in traces if trace.strategy != "X1+E3")
    found = {(trace.sample_key, trace.strategy) for trace in traces}
    every = {(item.sample.key, name) for item in items[1:] for name in names}
    few = set() if blind == "verifier" else {(items[0].sample.key, name) for name in names[:2]}
    assert found == every | few


def test_where_no_item_can_be_decoded_that_is_told(
    pair: ModelPair, items: list[BenchItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = items, [STRATEGIES[BASELINE]], {}, {}, DecodingConfig(max_new_tokens=4)
    told = "^no sample can be decoded; the first: RuntimeError: made up$"
    with monkeypatch.context() as patched:
        unseen_by(patched, pair.verifier, items)
        with pytest.raises(XsdError, match=told):
            list(bench.run(pair, PairConfig(device="cpu"), *given, repeats=1, warmup=1))

    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("made up")

    monkeypatch.setattr(Engine, "_prefill", broken)
    with pytest.raises(XsdError, match=told):
        list(bench.run(pair, PairConfig(device="cpu"), *given, repeats=1, warmup=1))
