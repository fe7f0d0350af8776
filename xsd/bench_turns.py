"""Who is timed beside whom: every strategy between two runs of plain decoding."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xsd.decoding.decoded import Decoded
from xsd.errors import XsdError
from xsd.types import Strategy

UNFIT = (RuntimeError, ValueError, OSError, XsdError)
"""What one sample may raise while the next may well succeed: it counts as failed."""


@dataclass(frozen=True)
class Turn:
    """What a strategy made of a sample or batch, or why it could not."""

    strategy: Strategy
    decoded: Sequence[Decoded] | Exception
    """An answer a sample; all of a batch have its times."""
    beside: Mapping[str, float]
    """For ``Trace.beside``."""


def beside_plain(
    strategies: Sequence[Strategy], decode: Callable[[Strategy], Sequence[Decoded]], seed: str
) -> Iterator[Turn]:
    """Every strategy's turn, in their order; the first one is the baseline.

    A machine's speed wanders within a round of all strategies by more than what they may cost, so a
    ratio is one of neighbours in time: plain decoding runs before and after each of the others.
    Their order is drawn anew by ``seed``: what one leaves behind (caches, a clock that heat has
    slowed) is then not always the same one's loss. The baseline's own turn is the middle one of its
    runs.

    Raises:
        RuntimeError, ValueError, OSError, XsdError: of the baseline, if no run of it succeeds. What
            others raise is in their turns; a plain run that failed is missed by its neighbours.
    """

    def tried(strategy: Strategy) -> Sequence[Decoded] | Exception:
        try:
            return decode(strategy)
        except UNFIT as error:
            return error

    baseline, *order = strategies
    random.Random(seed).shuffle(order)
    plain = [tried(baseline)]
    results = {}
    for strategy in order:
        results[strategy.name] = tried(strategy), len(plain) - 1
        plain.append(tried(baseline))
    good = sorted(_good(plain), key=lambda decoded: decoded[0].total_ms)
    if not good:
        raise next(failed for failed in plain if isinstance(failed, Exception))
    middle = good[len(good) // 2]
    yield Turn(baseline, middle, _mean_times([middle]))
    for strategy in strategies[1:]:
        result, before = results[strategy.name]
        neighbours = _good(plain[before : before + 2])
        if not neighbours and not isinstance(result, Exception):
            result = RuntimeError("plain decoding failed before and after")
        yield Turn(strategy, result, _mean_times(neighbours))


def _good(runs: Sequence[Sequence[Decoded] | Exception]) -> list[Sequence[Decoded]]:
    return [decoded for decoded in runs if not isinstance(decoded, Exception)]


def _mean_times(runs: Sequence[Sequence[Decoded]]) -> dict[str, float]:
    if not runs:
        return {}
    return {
        name: statistics.fmean(getattr(decoded[0], name) for decoded in runs)
        for name in ("prefill_ms", "decode_ms", "total_ms")
    }
