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
        RuntimeError, ValueError, OSError, XsdError: of the baseline; another one's is in its turn.
    """
    baseline, *order = strategies
    random.Random(seed).shuffle(order)
    plain = [decode(baseline)]
    found: dict[str, Turn] = {}
    for strategy in order:
        result: Sequence[Decoded] | Exception
        try:
            result = decode(strategy)
        except UNFIT as error:
            result = error
        plain.append(decode(baseline))
        found[strategy.name] = Turn(strategy, result, _mean_times(plain[-2:]))
    middle = sorted(plain, key=lambda decoded: decoded[0].total_ms)[len(plain) // 2]
    yield Turn(baseline, middle, _mean_times([middle]))
    yield from (found[strategy.name] for strategy in strategies[1:])


def _mean_times(runs: Sequence[Sequence[Decoded]]) -> dict[str, float]:
    return {
        name: statistics.fmean(getattr(decoded[0], name) for decoded in runs)
        for name in ("prefill_ms", "decode_ms", "total_ms")
    }
