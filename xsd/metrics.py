"""Offline metrics of an adapter: counts and sums that add, divided once at the edge.

What is scored is causal and cannot see its target: a level's output at ``t`` is held against the
verifier's state and token at ``t + shift``. The seed's figures for L5, B1 and L5F, at the same
position as a tensor they read, are kept apart as ``same_position``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cosine_similarity

from xsd.adapters.base import Adapter, Streams, advance
from xsd.adapters.catalog import Level
from xsd.counts import (
    HISTOGRAM_BINS,
    MAX_GAMMA,
    PREFIX,
    THRESHOLDS,
    TOP,
    Counts,
    Numbers,
    PositionCounts,
)
from xsd.decoding.accept import accepted_prefix, tau_from_prefix
from xsd.learning.cpu import CpuOps, product

_LOGITS = (1 << 20, 1 << 28)
"""Logits held at once, on a CPU (in its cache) and on a GPU."""


@dataclass(frozen=True)
class Scored:
    """What was counted of a batch."""

    counts: Counts
    accepted: Numbers
    """Of each answer, drafts from its start before the first miss; empty for heads."""


def score(
    adapter: Adapter,
    batches: Iterable[Streams],
    lm_head: Float[Tensor, "V Dv"],
    *,
    max_gamma: int = MAX_GAMMA,
) -> Counts:
    """Count over batches, in eval mode, on the adapter's device; ``tau`` up to ``max_gamma``."""
    scored = score_batches(adapter, batches, lm_head, max_gamma=max_gamma)
    return sum((part.counts for part in scored), Counts())


def score_batches(
    adapter: Adapter,
    batches: Iterable[Streams],
    lm_head: Float[Tensor, "V Dv"],
    *,
    max_gamma: int = MAX_GAMMA,
) -> Iterator[Scored]:
    """The same, batch by batch."""
    was_training = adapter.training
    adapter.eval()
    parameter = next(adapter.parameters(), lm_head)
    for streams in batches:
        yield score_batch(
            adapter, streams.to(parameter.device), lm_head.to(parameter.device), max_gamma
        )
    adapter.train(was_training)


@torch.no_grad()
def score_batch(
    adapter: Adapter, streams: Streams, lm_head: Float[Tensor, "V Dv"], max_gamma: int
) -> Scored:
    packed, _ = streams.packed()
    with CpuOps():
        chain = adapter.unroll(packed, max_gamma if adapter.row.feedback else 1)
    return score_chain(adapter.row, chain, packed, lm_head, max_gamma)


def score_chain(
    row: Level,
    chain: Sequence[Float[Tensor, "1 N Dv"]],
    packed: Streams,
    lm_head: Float[Tensor, "V Dv"],
    max_gamma: int,
) -> Scored:
    """Count an unrolled chain, of ``max_gamma`` steps where the level feeds back."""
    _, layout = packed.packed()
    hits, ranks = draft_hits(chain, packed, row.shift, lm_head)
    same = PositionCounts()
    if row.same_position:
        _, there = draft_hits(chain[:1], packed, 0, lm_head)
        same = count_positions(chain[0], there, packed, 0)
    target = count_positions(chain[0], ranks, packed, row.shift)
    if not row.feedback:
        hits = torch.stack([advance(hits[0], k) for k in range(max_gamma)])
    accepted = accepted_prefix(hits[0]).tolist() if row.shift == 0 else []
    return Scored(
        Counts(target=target, same_position=same) + count_drafts(hits, layout.lengths, row.shift),
        tuple(accepted),
    )


def draft_hits(
    chain: Sequence[Float[Tensor, "1 N Dv"]],
    packed: Streams,
    shift: int,
    lm_head: Float[Tensor, "V Dv"],
) -> tuple[Bool[Tensor, "G A T"], Int[Tensor, " M"]]:
    """Whether element k of the chain from t says token t + shift + k; a row an answer.

    And of the first element, the tokens that it held more likely than the stored one, at each of
    the M positions that have a target.
    """
    _, layout = packed.packed()
    hits, first_ranks = [], None
    for k, out in enumerate(chain):
        real = (layout.remaining > shift + k).nonzero().squeeze(1)
        ids = packed.ids[0, real + shift + k]
        best, ranks = _judge(out[0, real], ids, lm_head, ranked=k == 0)
        first_ranks = ranks if first_ranks is None else first_ranks
        match = torch.zeros_like(packed.mask[0]).index_copy_(0, real, best == ids)
        hits.append(layout.pad(match))
    assert first_ranks is not None, "a chain has one element at least"
    return torch.stack(hits), first_ranks


def count_positions(
    out: Float[Tensor, "1 N Dv"], ranks: Int[Tensor, " M"], packed: Streams, shift: int
) -> PositionCounts:
    """Hold ``out[0, t]`` against the state at ``t + shift``; ``ranks`` are those of its tokens."""
    _, layout = packed.packed()
    real = (layout.remaining > shift).nonzero().squeeze(1)
    there = real + shift
    cosine = cosine_similarity(out[0, real], packed.verifier[0, there], dim=-1)

    def by_answer(values: Shaped[Tensor, " M"]) -> Shaped[Tensor, "A S"]:
        """A row an answer, from the first position that is scored."""
        rows = values.new_zeros(layout.cells.shape).index_copy_(0, there, values)
        return layout.pad(rows)[:, shift:]

    mask = by_answer(torch.ones_like(ranks, dtype=torch.bool))
    matched = by_answer(ranks == 0)
    above = torch.stack([by_answer(cosine > threshold) for threshold in THRESHOLDS])
    # reached[t]: everything scored before t matched.
    before = torch.ones_like(matched)
    before[:, 1:] = matched.long().cumprod(dim=1)[:, :-1].bool()
    reached = before & mask

    def by_position(x: Shaped[Tensor, "A S"]) -> tuple[Any, ...]:
        return (0,) * shift + tuple(x.sum(dim=0).tolist())

    return PositionCounts(
        num_samples=int(mask.any(dim=1).sum()),
        cos_sum=cosine.double().sum().item(),
        accepted=tuple(above.sum(dim=(1, 2)).tolist()),
        consecutive=tuple(accepted_prefix(above).sum(dim=1).tolist()),
        top=tuple(int((ranks < k).sum()) for k in TOP),
        cos_histogram=tuple(
            torch.histc(cosine.float(), bins=HISTOGRAM_BINS, min=-1, max=1).long().tolist()
        ),
        scored=by_position(mask),
        cos_by_position=by_position(by_answer(cosine.double())),
        accepted_90=by_position(above[THRESHOLDS.index(0.90)]),
        matched=by_position(matched),
        reached=by_position(reached),
        matched_reached=by_position(reached & matched),
    )


def count_drafts(hits: Bool[Tensor, "G A T"], lengths: Sequence[int], shift: int) -> Counts:
    """Count accepted drafts of chains.

    ``hits[k, a, t]``: element k of the chain from anchor t is token ``t + shift + k``, within the
    answer. Levels with shift 0 draft token t itself, so the cycle that knows tokens 0..t takes the
    chain of anchor ``t + 1``.
    """
    num_steps = hits.shape[0]
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


def _judge(
    rows: Float[Tensor, "M Dv"],
    ids: Int[Tensor, " M"],
    lm_head: Float[Tensor, "V Dv"],
    *,
    ranked: bool,
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Of each row the most likely token, and how many it holds more likely than ``ids``; the logits
    are held a few rows at a time."""
    size = max(1, _LOGITS[rows.device.type == "cuda"] // lm_head.shape[0])
    best, ranks = torch.empty_like(ids), torch.zeros_like(ids)
    for first in range(0, len(ids), size):
        part = slice(first, first + size)
        logits = product(rows[part], lm_head)
        best[part] = logits.argmax(dim=-1)
        if ranked:
            said = logits.gather(1, ids[part, None])
            # Of equals the first is said.
            ranks[part] = torch.where(best[part] == ids[part], 0, (logits > said).sum(dim=1))
    return best, ranks
