"""Two adapters on one answer: where the gap's drafts end, the head's begin. Counts only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xsd.adapters.base import Adapter, Streams
from xsd.decoding.accept import accepted_prefix, tau_from_prefix
from xsd.learning.cpu import CpuOps
from xsd.metrics import draft_hits


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
        opening = _hits(gap, first.to(device), 1, lm_head)[..., 0]
        prefixes = accepted_prefix(_hits(head, second.to(device), gamma, lm_head)).tolist()
        matched, lengths = accepted_prefix(opening).tolist(), second.packed()[1].lengths
        for matches, prefix, length in zip(matched, prefixes, lengths, strict=True):
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
    adapter: Adapter, streams: Streams, num_steps: int, lm_head: Float[Tensor, "V Dv"]
) -> Bool[Tensor, "A T steps"]:
    """Whether the chain from t says the answer's tokens, a row an answer."""
    packed, _ = streams.packed()
    with CpuOps():
        chain = adapter.unroll(packed, num_steps)
    hits, _ = draft_hits(chain, packed, adapter.row.shift, lm_head.to(packed.ids.device))
    return hits.permute(1, 2, 0)
