"""Measured decode speedup against the formula of speculative decoding, with measured costs.

Drafts hold at given rates (control ``synthetic``), so acceptance is known and no drafter matters.
For every rate and gamma three numbers stand side by side:

- *measured*: time of plain decoding over time of decoding with drafts, summed over the samples;
- *formula*: the same ratio from counts and costs alone. Of a sample with N tokens after the first,
  whose cycles verified n_1, n_2, ... drafts and which took m plain steps beside them,

      S = N t / (b + sum_i (V(n_i + 1) + c) + m t),

  which is ``speedup.Costs.decode_speedup``, and b and c, where all cycles have gamma drafts. The
  counts are those that occurred;
- *alone*: the same without b and c, from nothing but t and V, each measured by itself.

b and c are what is left over at rates of 0 and 1, so they take up any error that is the same in
every cycle: *formula* proves that between those rates the counts alone make the speedup, *alone*
how much of it passes and steps explain with nothing fitted.

What goes in is measured on other answers and passes than those that are compared, in the same
rounds, so that a machine that slows down slows all alike:

- t: plain answers of their own, over their steps;
- V(r): single passes of r rows, in the middle of an answer;
- b and c: what decoding takes beside its passes and steps, once and for every cycle: the first pass
  finds cold caches behind the prefill; drafts (here a look-up), calls and bookkeeping come again
  and again. Two numbers for each gamma, from two kinds of answers: those in which no draft holds,
  with as many cycles as tokens, and those in which all hold, with few. Both at once, for a price a
  cycle from one kind alone is wrong for the other.

No cost is chosen so that a speedup comes out: rates of 0 and 1 are not among those compared.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from xsd.clock import interleaved
from xsd.decoding.controls import Known, OracleHead
from xsd.decoding.decoded import Decoded
from xsd.decoding.engine import Engine
from xsd.decoding.speculator import Speculator
from xsd.pairs.base import Decoder, Media
from xsd.speedup import Costs
from xsd.types import Strategy

ALPHAS = (0.2, 0.4, 0.6, 0.8)
GAMMAS = range(1, 9)
BAR = 0.1
_ENDS = (0.0, 1.0)
"""The rates of the answers that tell what decoding costs beside its passes."""
_AGAIN = 4
"""Cells of the grid between two plain answers."""

Point = tuple[float, int]
"""Rate and gamma."""


class Bench(Protocol):
    """What ``engine.Bench`` has of it."""

    verifier: Decoder
    engine: Engine
    device: torch.device
    asked: list[tuple[Media, str]]

    def verify(self, role: str, num_rows: int) -> Callable[[], object]: ...
    def party(self, strategy: Strategy, head: Any) -> Speculator: ...


def measure(bench: Bench, repeats: int) -> dict[str, list[dict[str, float]]]:
    """``points``: measured, formula and alone of every rate and gamma, pooled over the samples;
    ``costs``: t, V(gamma + 1), b and c of every gamma, means of the samples.

    A sample's drafts are the same in every repeat; its times and costs are medians over repeats.
    """
    found = [_Sample(bench, index, repeats) for index in range(len(bench.asked))]
    compared = [sample.compared() for sample in found]
    points = []
    for alpha, gamma in itertools.product(ALPHAS, GAMMAS):
        rows = [row[alpha, gamma] for row in compared]
        total = {name: sum(row[name] for row in rows) for name in rows[0]}
        points.append(
            {
                "alpha": alpha,
                "gamma": gamma,
                "tau": total["said"] / total["calls"],
                "measured": total["plain_ms"] / total["spent_ms"],
                "formula": total["steps_ms"] / total["cycles_ms"],
                "alone": total["steps_ms"] / total["passes_ms"],
            }
        )
    costs = [
        {
            "gamma": gamma,
            "step_ms": statistics.mean(sample.costs.step_ms for sample in found),
            "pass_ms": statistics.mean(sample.costs.verify_ms(gamma + 1) for sample in found),
            "start_ms": statistics.mean(sample.beside[gamma][0] for sample in found),
            "cycle_ms": statistics.mean(sample.beside[gamma][1] for sample in found),
        }
        for gamma in GAMMAS
    ]
    return {"points": points, "costs": costs}


class _Sample:
    """One clip and question, decoded at every rate and gamma, and what that should cost."""

    def __init__(self, bench: Bench, index: int, repeats: int) -> None:
        self.bench, self.index, self.asked = bench, index, bench.asked[index]
        self.known = Known()
        works = {str(r): bench.verify("verifier", r) for r in range(1, max(GAMMAS) + 2)}
        pass_ms: dict[str, list[float]] = {rows: [] for rows in works}
        self.plain_ms: list[float] = []
        step_ms: list[float] = []
        grid = [*itertools.product((*_ENDS, *ALPHAS), GAMMAS)]
        self.decoded: dict[Point, list[Decoded]] = {point: [] for point in grid}
        for _ in range(repeats):
            for rows, times in interleaved(works, bench.device, 5, 1, settle=1).items():
                pass_ms[rows] += times
            for number, point in enumerate(grid):
                if number % _AGAIN == 0:
                    plain = bench.engine.plain(*self.asked)
                    self.known.answer = plain.token_ids
                    # In turn: half are what is compared, half are what it is predicted from.
                    side = step_ms if number % (2 * _AGAIN) else self.plain_ms
                    side.append(plain.decode_ms)
                self.decoded[point].append(self._speculate(*point))
        self.num_said = len(self.known.answer) - 1
        t = statistics.median(step_ms) / max(1, self.num_said)
        medians = {int(rows): statistics.median(times) for rows, times in pass_ms.items()}
        self.costs = Costs(t, 0.0, 0.0, 1.0, 0.0, {**medians, 1: t})
        self.beside = {gamma: self._beside(gamma) for gamma in GAMMAS}

    def _speculate(self, alpha: float, gamma: int) -> Decoded:
        vocab, seed = self.bench.verifier.vocab_size, 100 * self.index + gamma
        head = OracleHead(self.known, [alpha], vocab, seed)
        party = self.bench.party(Strategy("synthetic", head="synthetic:", gamma=gamma), head)
        return self.bench.engine.speculate(*self.asked, party, gamma)

    def _beside(self, gamma: int) -> tuple[float, float]:
        """b and c."""
        (many, slow_ms), (few, quick_ms) = (self._rest(self.decoded[end, gamma]) for end in _ENDS)
        # In the shortest answers both kinds have one cycle: all of it is the cycle's then.
        start_ms = (quick_ms * many - slow_ms * few) / (many - few) if many > few else 0.0
        return start_ms, (slow_ms - start_ms) / max(1, many)

    def _rest(self, answers: Sequence[Decoded]) -> tuple[int, float]:
        """Cycles, and what they took beside passes and plain steps."""
        drafted = answers[0].cycle_drafted
        spent_ms = statistics.median(answer.decode_ms for answer in answers)
        passes_ms = self._passes_ms(drafted, self._num_steps(answers[0]))
        return len(drafted), spent_ms - passes_ms

    def _passes_ms(self, drafted: Sequence[int], num_steps: int) -> float:
        """What passes over so many drafts each, and so many plain steps, cost."""
        passes_ms = sum(self.costs.verify_ms(size + 1) for size in drafted)
        return passes_ms + num_steps * self.costs.step_ms

    def _num_steps(self, answer: Decoded) -> int:
        """Plain ones, where there was no room for a draft."""
        accepted = answer.cycle_accepted
        return max(0, self.num_said - sum(accepted) - len(accepted))

    def compared(self) -> dict[Point, dict[str, float]]:
        """Of every point what was measured, and what costs and counts say."""
        found = {}
        for alpha, gamma in itertools.product(ALPHAS, GAMMAS):
            answers = self.decoded[alpha, gamma]
            start_ms, cycle_ms = self.beside[gamma]
            drafted, num_steps = answers[0].cycle_drafted, self._num_steps(answers[0])
            passes_ms = self._passes_ms(drafted, num_steps)
            found[alpha, gamma] = {
                "plain_ms": statistics.median(self.plain_ms),
                "spent_ms": statistics.median(answer.decode_ms for answer in answers),
                "steps_ms": self.num_said * self.costs.step_ms,
                "passes_ms": passes_ms,
                "cycles_ms": start_ms + passes_ms + len(drafted) * cycle_ms,
                "said": self.num_said,
                "calls": len(drafted) + num_steps,
            }
        return found


def apart(points: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """How far every measured speedup is from that of a column."""
    return [row["measured"] / row[name] - 1 for row in points]


def worst(points: Sequence[Mapping[str, float]], name: str) -> float:
    return max(map(abs, apart(points, name)))


def show(found: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """Print all tables; the largest difference of a speedup from the formula's."""
    points = found["points"]
    print("\nDecode speedup, measured / by the formula with measured costs and real counts")
    _show_points(points, lambda row: f"{row['measured']:.2f}/{row['formula']:.2f}")
    for name, text in (("pass_ms", "V"), ("start_ms", "b"), ("cycle_ms", "c")):
        line = "".join(f"{row[name]:.3f} ms".ljust(16) for row in found["costs"])
        print(f"  {text:<7}{line}")
    step_ms = found["costs"][0]["step_ms"]
    print(f"  t {step_ms:.3f} ms; V: a pass of gamma + 1 rows; beside passes: b once, c a cycle")
    low, high = _range(points, "formula")
    bar = "yes" if worst(points, "formula") <= BAR else "NO"
    print(f"  differences {low:+.1%} to {high:+.1%}; bar: within {BAR:.0%}: {bar}")
    print("The same from t and V alone, nothing fitted to what is left over (no b, no c)")
    _show_points(
        points,
        lambda row: f"{row['alone']:.2f} ({row['measured'] / row['alone'] - 1:+.1%})",
    )
    low, high = _range(points, "alone")
    print(f"  differences {low:+.1%} to {high:+.1%}: what cycles take that t and V do not show")
    return worst(points, "formula")


def _show_points(
    points: Sequence[Mapping[str, float]], cell: Callable[[Mapping[str, float]], str]
) -> None:
    print("  alpha  " + "".join(f"gamma {gamma:<10}" for gamma in GAMMAS))
    for alpha in ALPHAS:
        line = "".join(cell(row).ljust(16) for row in points if row["alpha"] == alpha)
        print(f"  {alpha:<7}{line}")


def _range(points: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    found = apart(points, name)
    return min(found), max(found)
