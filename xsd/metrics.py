"""Offline metrics of an adapter: counts and sums that add, divided once at the edge.

What is scored is causal and cannot see its target: a level's output at ``t`` is held against the
verifier's state and token at ``t + shift``. The seed's figures for L5, B1 and L5F, at the same
position as a tensor they read, are kept apart as ``same_position``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from xsd.adapters.base import Adapter, Streams, advance
from xsd.decoding.accept import accepted_prefix, tau_from_prefix

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
TOP = (1, 5, 10)
PREFIX = 22
"""Drafts that fit into the prefill gap of the seed's pair: n of ``accepted_prefix_n``."""
MAX_GAMMA = 8
HISTOGRAM_BINS = 40
"""Bins of the cosine's histogram, from -1 to 1."""
_MAX_LOGITS = 1 << 24

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


@torch.no_grad()
def score(
    adapter: Adapter,
    batches: Iterable[Streams],
    lm_head: Float[Tensor, "V Dv"],
    *,
    max_gamma: int = MAX_GAMMA,
) -> Counts:
    """Count over batches, in eval mode, on the adapter's device; ``tau`` up to ``max_gamma``."""
    was_training = adapter.training
    adapter.eval()
    device = next(adapter.parameters()).device
    counts = Counts()
    for streams in batches:
        counts += score_batch(adapter, streams.to(device), lm_head.to(device), max_gamma)
    adapter.train(was_training)
    return counts


def score_batch(
    adapter: Adapter, streams: Streams, lm_head: Float[Tensor, "V Dv"], max_gamma: int
) -> Counts:
    row = adapter.row
    chain = adapter.unroll(streams, max_gamma if row.feedback else 1)
    matches = [_match(out, streams, row.shift + k, lm_head) for k, out in enumerate(chain)]
    if not row.feedback:
        matches = [advance(matches[0], k) for k in range(max_gamma)]
    hits = torch.stack(matches)
    return Counts(
        target=count_positions(chain[0], matches[0], streams, row.shift, lm_head),
        same_position=(
            count_positions(chain[0], _match(chain[0], streams, 0, lm_head), streams, 0, lm_head)
            if row.same_position
            else PositionCounts()
        ),
    ) + count_drafts(hits, streams.mask, row.shift)


def count_positions(
    out: Float[Tensor, "B T Dv"],
    match: Bool[Tensor, "B T"],
    streams: Streams,
    shift: int,
    lm_head: Float[Tensor, "V Dv"],
) -> PositionCounts:
    """Hold ``out[:, t]`` against state and token at ``t + shift``; ``match[:, t]`` is its top-1."""
    length = out.shape[1] - shift
    mask, match = streams.mask[:, shift:], match[:, :length]
    target = streams.verifier[:, shift:]
    cosine = cosine_similarity(out[:, :length], target, dim=-1)
    above = torch.stack([(cosine > threshold) & mask for threshold in THRESHOLDS])
    real = cosine[mask].double()
    ranks = _ranks(out[:, :length][mask], streams.ids[:, shift:][mask], lm_head)
    # reached[t]: everything scored before t matched.
    matched = match & mask
    before = torch.ones_like(matched)
    before[:, 1:] = matched.long().cumprod(dim=1)[:, :-1].bool()
    reached = before & mask

    def by_position(x: Tensor) -> tuple[Any, ...]:
        return (0,) * shift + tuple(x.sum(dim=0).tolist())

    return PositionCounts(
        num_samples=int(mask.any(dim=1).sum()),
        cos_sum=real.sum().item(),
        accepted=tuple(above.sum(dim=(1, 2)).tolist()),
        consecutive=tuple(accepted_prefix(above).sum(dim=1).tolist()),
        top=(int(matched.sum()), *(int((ranks < k).sum()) for k in TOP[1:])),
        cos_histogram=tuple(
            torch.histc(real.float(), bins=HISTOGRAM_BINS, min=-1, max=1).long().tolist()
        ),
        scored=by_position(mask),
        cos_by_position=by_position(torch.where(mask, cosine, 0.0).double()),
        accepted_90=by_position(above[THRESHOLDS.index(0.90)]),
        matched=by_position(matched),
        reached=by_position(reached),
        matched_reached=by_position(reached & matched),
    )


def count_drafts(hits: Bool[Tensor, "G B T"], mask: Bool[Tensor, "B T"], shift: int) -> Counts:
    """Count accepted drafts of chains.

    ``hits[k, b, t]``: element k of the chain from anchor t is token ``t + shift + k``, within the
    answer. Levels with shift 0 draft token t itself, so the cycle that knows tokens 0..t takes the
    chain of anchor ``t + 1``.
    """
    num_steps = hits.shape[0]
    lengths = mask.sum(dim=1).tolist()
    anchors = hits.permute(1, 2, 0) if shift else advance(hits.permute(1, 2, 0), 1)
    prefixes = accepted_prefix(anchors).tolist()
    walks = [
        [tau_from_prefix(p, gamma, n) for p, n in zip(prefixes, lengths, strict=True)]
        for gamma in range(1, num_steps + 1)
    ]
    histogram: Numbers = ()
    if shift == 0:
        accepted = accepted_prefix(hits[0, :, :PREFIX])
        histogram = tuple(torch.bincount(accepted, minlength=PREFIX + 1).tolist())
    joint = anchors.long().cumprod(dim=-1)
    return Counts(
        prefix_histogram=histogram,
        cycles=tuple(sum(cycles for cycles, _ in walk) for walk in walks),
        emitted=tuple(sum(emitted for _, emitted in walk) for walk in walks),
        chain_scored=tuple(sum(max(0, n - k - 1) for n in lengths) for k in range(num_steps)),
        chain_matched=tuple(joint.sum(dim=(0, 1)).tolist()),
    )


def _match(
    out: Float[Tensor, "B T Dv"], streams: Streams, offset: int, lm_head: Float[Tensor, "V Dv"]
) -> Bool[Tensor, "B T"]:
    """Whether the most likely token at t is the stored token at t + offset."""
    match = torch.zeros_like(streams.mask)
    real = advance(streams.mask, offset)
    rows, ids = out[real], advance(streams.ids, offset)[real]
    size = max(1, _MAX_LOGITS // lm_head.shape[0])
    best = [(part @ lm_head.T).argmax(dim=-1) for part in torch.split(rows, size)]
    match[real] = torch.cat(best) == ids
    return match


def _ranks(
    rows: Float[Tensor, "N Dv"], ids: Int[Tensor, " N"], lm_head: Float[Tensor, "V Dv"]
) -> Int[Tensor, " N"]:
    """Tokens that are more likely than the stored one."""
    size = max(1, _MAX_LOGITS // lm_head.shape[0])
    ranks = []
    for part, wanted in zip(torch.split(rows, size), torch.split(ids, size), strict=True):
        logits = part @ lm_head.T
        ranks.append((logits > logits.gather(1, wanted[:, None])).sum(dim=1))
    return torch.cat(ranks)


def _ratio(numerator: float | int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0
