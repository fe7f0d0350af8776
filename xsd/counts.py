"""What an evaluation counts: sums that add, divided once at the edge. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any, TypeVar

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
TOP = (1, 5, 10)
PREFIX = 22
"""Drafts that fit into the prefill gap of the seed's pair: n of ``accepted_prefix_n``."""
MAX_GAMMA = 8
HISTOGRAM_BINS = 40
"""Bins of the cosine's histogram, from -1 to 1."""

Numbers = tuple[int, ...]

S = TypeVar("S", bound="_Sums")


@dataclass(frozen=True)
class _Sums:
    """Adds field by field; tuples element by element, the shorter one as if filled with zeros."""

    def __add__(self: S, other: S) -> S:
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return type(self)(*(_add(a, b) for a, b in pairs))


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))
    return a + b


@dataclass(frozen=True)
class PositionCounts(_Sums):
    """One output a position, held against the verifier's state and token there."""

    num_samples: int = 0
    """Answers with at least one scored position."""
    cos_sum: float = 0.0
    accepted: Numbers = (0,) * len(THRESHOLDS)
    """Positions whose cosine exceeds each threshold."""
    consecutive: Numbers = (0,) * len(THRESHOLDS)
    """Such positions before an answer's first miss, summed over answers."""
    top: Numbers = (0,) * len(TOP)
    """Positions whose token is among the 1, 5, 10 most likely."""
    cos_histogram: Numbers = (0,) * HISTOGRAM_BINS
    scored: Numbers = ()
    """By answer position: outputs scored there."""
    cos_by_position: tuple[float | int, ...] = ()
    accepted_90: Numbers = ()
    matched: Numbers = ()
    """By position: token hits (marginal)."""
    reached: Numbers = ()
    """By position: all earlier scored tokens of the answer matched."""
    matched_reached: Numbers = ()
    """By position: hits among those (conditional on an accepted prefix)."""

    def rates(self) -> dict[str, float]:
        total = sum(self.scored)
        rates = {"cos_sim_mean": _ratio(self.cos_sum, total)}
        for i, threshold in enumerate(THRESHOLDS):
            percent = round(100 * threshold)
            rates[f"accept_{percent}"] = _ratio(self.accepted[i], total)
            rates[f"consecutive_mean_{percent}"] = _ratio(self.consecutive[i], self.num_samples)
        for i, k in enumerate(TOP):
            rates[f"token_top{k}_match"] = _ratio(self.top[i], total)
        return rates

    def positions(self) -> list[dict[str, float | int]]:
        """A row an answer position that was scored."""
        return [
            {
                "position": position,
                "num": num,
                "cos_sim": _ratio(self.cos_by_position[position], num),
                "accept_90": _ratio(self.accepted_90[position], num),
                "match": _ratio(self.matched[position], num),
                "num_reached": self.reached[position],
                "match_given_prefix": _ratio(
                    self.matched_reached[position], self.reached[position]
                ),
            }
            for position, num in enumerate(self.scored)
            if num
        ]


@dataclass(frozen=True)
class Counts(_Sums):
    """Everything an evaluation counts. ``sum(parts, Counts())`` joins batches, ranks, chunks."""

    target: PositionCounts = field(default_factory=PositionCounts)
    """At the position that the level predicts."""
    same_position: PositionCounts = field(default_factory=PositionCounts)
    """The seed's leaky figures; empty but for L5, B1 and L5F."""
    prefix_histogram: Numbers = ()
    """Answers by accepted prefix, 0 to 22; empty for heads, which need the first token."""
    cycles: Numbers = ()
    """Verifier calls after prefill, for gamma = 1, 2, ..."""
    emitted: Numbers = ()
    """Tokens they emitted."""
    chain_scored: Numbers = ()
    """Anchors whose first k drafts all lie within the answer, k = 1, 2, ..."""
    chain_matched: Numbers = ()
    """Those whose first k drafts all match (joint, never a product of marginals)."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Counts:
        """Out of its fields as JSON gives them: objects and lists; numbers are the very ones."""
        sides = {
            name: PositionCounts(**_tuples(values[name])) for name in ("target", "same_position")
        }
        return cls(**{**_tuples(values), **sides})

    def rates(self) -> dict[str, float]:
        """Flat metric keys -> values; the only place that divides."""
        rates = self.target.rates()
        if self.prefix_histogram:
            matched = sum(k * num for k, num in enumerate(self.prefix_histogram))
            rates[f"accepted_prefix_{PREFIX}"] = _ratio(matched, sum(self.prefix_histogram))
        for i, cycles in enumerate(self.cycles):
            rates[f"tau_{i + 1}"] = _ratio(self.emitted[i], cycles)
        if self.same_position.num_samples:
            same = self.same_position.rates()
            rates |= {f"same_position.{key}": value for key, value in same.items()}
        return rates


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def _ratio(numerator: float | int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0
