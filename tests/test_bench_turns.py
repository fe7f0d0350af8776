"""Who is timed beside whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from xsd.bench_turns import Turn, beside_plain
from xsd.decoding.decoded import Decoded
from xsd.decoding.strategies import parse
from xsd.types import Strategy

STRATEGIES = [parse(name, 3) for name in ("vl_baseline", "oracle", "ngram", "synthetic:0.5")]
PLAIN = STRATEGIES[0]


def at_a_clock(asked: list[str]) -> Callable[[Strategy], list[Decoded]]:
    """An answer's time is how many were asked for before."""

    def decode(strategy: Strategy) -> list[Decoded]:
        asked.append(strategy.name)
        return [Decoded(total_ms=float(len(asked)))]

    return decode


def total_ms(turn: Turn) -> float:
    assert not isinstance(turn.decoded, Exception)
    return turn.decoded[0].total_ms


def test_plain_decoding_runs_before_and_after_every_other() -> None:
    asked: list[str] = []
    turns = list(beside_plain(STRATEGIES, at_a_clock(asked), "a 0"))
    assert [turn.strategy for turn in turns] == STRATEGIES
    assert asked[::2] == [PLAIN.name] * 4
    assert sorted(asked[1::2]) == sorted(strategy.name for strategy in STRATEGIES[1:])
    for turn in turns[1:]:
        # The clock is even, so the mean of both neighbours is one's own time.
        assert turn.beside["total_ms"] == total_ms(turn) == asked.index(turn.strategy.name) + 1


def test_the_order_is_drawn_anew_by_its_seed() -> None:
    def order(seed: str) -> tuple[str, ...]:
        asked: list[str] = []
        list(beside_plain(STRATEGIES, at_a_clock(asked), seed))
        return tuple(asked)

    orders = [order(f"a {repeat}") for repeat in range(6)]
    assert orders == [order(f"a {repeat}") for repeat in range(6)]
    assert len(set(orders)) > 2


def test_the_baseline_is_the_middle_one_of_its_runs() -> None:
    times: Iterator[float] = iter([9.0, 1.0, 2.0, 30.0])

    def decode(strategy: Strategy) -> list[Decoded]:
        ms = next(times) if strategy is PLAIN else 50.0
        return [Decoded(total_ms=ms, prefill_ms=ms / 2)]

    baseline = next(iter(beside_plain(STRATEGIES, decode, "a 0")))
    assert total_ms(baseline) == 9.0
    assert baseline.beside == {"prefill_ms": 4.5, "decode_ms": 4.5, "total_ms": 9.0}


def test_who_fails_is_told_in_its_turn_and_the_others_go_on() -> None:
    def decode(strategy: Strategy) -> list[Decoded]:
        if strategy.name == "ngram":
            raise RuntimeError("out of memory")
        return [Decoded()]

    found = [turn.decoded for turn in beside_plain(STRATEGIES, decode, "a 0")]
    assert [isinstance(decoded, RuntimeError) for decoded in found] == [False, False, True, False]


def test_a_plain_run_that_fails_is_missed_by_its_neighbours_alone() -> None:
    numbers = count()

    def decode(strategy: Strategy) -> list[Decoded]:
        number = next(numbers)
        if number in fails:
            raise RuntimeError("out of memory")
        return [Decoded(total_ms=float(number))]

    fails: set[int] = {2}
    turns = list(beside_plain(STRATEGIES, decode, "a 0"))
    beside = {total_ms(turn): turn.beside["total_ms"] for turn in turns}
    assert beside == {4.0: 4.0, 1.0: 0.0, 3.0: 4.0, 5.0: 5.0}

    numbers, fails = count(), {2, 4}
    found = [turn.decoded for turn in beside_plain(STRATEGIES, decode, "a 0")]
    failed = [decoded for decoded in found if isinstance(decoded, Exception)]
    assert [str(error) for error in failed] == ["plain decoding failed before and after"]

    numbers, fails = count(), {0, 2, 4, 6}
    with pytest.raises(RuntimeError, match="out of memory"):
        list(beside_plain(STRATEGIES, decode, "a 0"))
