"""Two adapters on one answer: where the gap's drafts end, the head's begin. Counts only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter, Streams, advance
from xsd.decoding.accept import accepted_prefix, tau_from_prefix


@dataclass(frozen=True)
class TwoPhaseCounts:
    """Of every answer, in order."""

    lengths: tuple[int, ...]
    """Tokens, EOS included."""
    accepted: tuple[int, ...]
    """Drafts of the gap that match before the first miss; the free ones only."""
    cycles: tuple[int, ...]
    """Verifier calls of decode after them."""
    emitted: tuple[int, ...]
    """Tokens that these calls say."""
    cycles_alone: tuple[int, ...]
    """Verifier calls if nothing had been drafted in the gap."""

    @property
    def tau(self) -> float:
        """Tokens a verifier call, from where the gap's drafts ended."""
        return sum(self.emitted) / max(1, sum(self.cycles))

    @property
    def tau_alone(self) -> float:
        """The same from the second token on."""
        return sum(n - 1 for n in self.lengths) / max(1, sum(self.cycles_alone))


@torch.no_grad()
def count_two_phase(
    gap: Adapter,
    head: Adapter,
    batches: Iterable[tuple[Streams, Streams]],
    lm_head: Float[Tensor, "V Dv"],
    *,
    num_free: Callable[[int], int],
    gamma: int,
) -> TwoPhaseCounts:
    """Draft every answer's opening by ``gap`` and the rest by ``head``.

    Args:
        batches: the same answers twice, as either adapter reads them.
        num_free: answer length -> drafts that are ready when the verifier's prefill ends.
        gamma: drafts a verifier call of decode.
    """
    device = next(head.parameters()).device
    rows: list[tuple[int, int, int, int, int]] = []
    for first, second in batches:
        ours, theirs = first.to(device), second.to(device)
        opening = accepted_prefix(_hits(gap(ours), ours, 0, lm_head)).tolist()
        chain = head.unroll(theirs, gamma)
        hits = [_hits(out, theirs, head.row.shift + k, lm_head) for k, out in enumerate(chain)]
        prefixes = accepted_prefix(torch.stack(hits, dim=-1)).tolist()
        lengths = theirs.mask.sum(dim=1).tolist()
        for matches, prefix, length in zip(opening, prefixes, lengths, strict=True):
            rows.append(_hand_over(matches, prefix, length, num_free(length), gamma))
    columns = zip(*rows, strict=True) if rows else ((),) * 5
    return TwoPhaseCounts(*(tuple(column) for column in columns))


def _hand_over(
    matches: int, prefix: list[int], length: int, num_free: int, gamma: int
) -> tuple[int, int, int, int, int]:
    """Length, accepted, cycles, emitted, cycles alone, of one answer."""
    accepted = min(matches, num_free)
    # Prefill says token 0, and a pass over further drafts one token more than it accepts.
    known = min(length, max(1, accepted) + (accepted > 0 and num_free > 1))
    cycles, emitted = tau_from_prefix(prefix[known - 1 :], gamma, length - known + 1)
    return length, accepted, cycles, emitted, tau_from_prefix(prefix, gamma, length)[0]


def _hits(
    out: Float[Tensor, "B T Dv"], streams: Streams, offset: int, lm_head: Float[Tensor, "V Dv"]
) -> Bool[Tensor, "B T"]:
    """Whether the most likely token at t is the answer's at t + offset."""
    tokens: Int[Tensor, "B T"] = (out @ lm_head.to(out.device).T).argmax(dim=-1)
    return (tokens == advance(streams.ids, offset)) & advance(streams.mask, offset)
