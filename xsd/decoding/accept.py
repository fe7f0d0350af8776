"""The acceptance rule, pure: what offline metrics and live decoding both go by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def accepted_prefix(match: Bool[Tensor, "*batch n"]) -> Int[Tensor, "*batch"]:
    """Matching drafts before the first miss."""
    return match.long().cumprod(dim=-1).sum(dim=-1)


def accepted_prefix_length(drafts: Sequence[int], said: Sequence[int]) -> int:
    """Drafts before the first that differs from what was said (or that nothing was said to)."""
    accepted = 0
    for draft, token in zip(drafts, said, strict=False):
        if draft != token:
            break
        accepted += 1
    return accepted


def verify_greedy(drafts: Sequence[int], argmax: Sequence[int]) -> tuple[int, int]:
    """Check a chain against the verifier's own choices.

    Args:
        drafts: g drafted tokens.
        argmax: the verifier's g + 1 choices: ``argmax[i]`` is its token where ``drafts[i]``
            stands, and the last one follows after all drafts.

    Returns:
        Drafts accepted, and the verifier's token after them (the bonus token).
    """
    assert len(argmax) == len(drafts) + 1, f"{len(drafts)} drafts, {len(argmax)} choices"
    accepted = accepted_prefix_length(drafts, argmax)
    return accepted, argmax[accepted]


def verify_sampled(
    drafts: Sequence[int],
    q: Float[Tensor, "g V"],
    p: Float[Tensor, "g1 V"],
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """Check a sampled chain so that tokens follow the verifier's distribution exactly.

    Draft i is accepted with probability min(1, p/q); the first rejected one is replaced by a
    sample of (p - q)+, normalised (Leviathan et al., arXiv:2211.17192, algorithm 1).

    Args:
        drafts: g tokens, each sampled from its row of ``q``.
        q: the drafts' probabilities.
        p: the verifier's, g + 1 rows.
        generator: random numbers, on the device of ``p``.

    Returns:
        Drafts accepted, and the token after them.
    """
    assert len(drafts) == len(q) == len(p) - 1, "one row of p more than drafts"
    for i, token in enumerate(drafts):
        chance = torch.rand((), generator=generator, device=p.device)
        if chance * q[i, token] >= p[i, token]:
            return i, _sample(residual(p[i], q[i]), generator)
    return len(drafts), _sample(p[-1], generator)


def residual(p: Float[Tensor, " V"], q: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """(p - q)+, normalised; p itself where the two are equal."""
    rest = (p - q).clamp(min=0.0)
    total = rest.sum()
    return rest / total if total > 0 else p


def tau_from_prefix(prefix: Sequence[int], gamma: int, length: int) -> tuple[int, int]:
    """Walk one answer in cycles of ``gamma`` drafts.

    The verifier's prefill yields token 0 for nothing. A cycle that starts with tokens 0..t known
    accepts ``min(prefix[t], gamma)`` drafts and adds the verifier's own next token; the last one is
    cut at the answer's end.

    Args:
        prefix: ``prefix[t]`` of the drafts for t + 1, t + 2, ... match before the first miss.
        gamma: drafts a cycle.
        length: tokens of the answer, EOS included.

    Returns:
        Cycles (verifier calls after prefill), and tokens they emitted: tau = tokens / cycles.
    """
    cycles, known = 0, 1
    while known < length:
        known += min(prefix[known - 1], gamma) + 1
        cycles += 1
    return cycles, max(0, length - 1)


def _sample(p: Tensor, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(p, 1, generator=generator))
