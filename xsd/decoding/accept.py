"""The acceptance rule, pure: what offline metrics and live decoding both go by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses at what is said next: a chain, or a tree whose root is the last token said."""

    tokens: list[int]
    parents: list[int] | None = None
    """Of every token, the one it follows: an earlier one, or -1 for the root; None: a chain."""
    q: Float[Tensor, "n V"] | None = None
    """What each token was sampled from; siblings share it, and were drawn independently of each
    other. None: the tokens were not drawn but chosen."""
    confidence: list[float] | None = None
    """How probable each token is to follow its parent, as whoever drafted it believes."""
    num_levels: int = field(default=0, compare=False)
    """How deep was drafted, where that was deeper than these tokens reach."""

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> Iterator[int]:
        """The guesses that follow ``node`` (-1: the root), in the order they are to be tried."""
        if self.parents is None:
            return iter((node + 1,) if node + 1 < len(self.tokens) else ())
        return (i for i in range(node + 1, len(self.tokens)) if self.parents[i] == node)

    def cut(self, size: int) -> Draft:
        """The first ``size`` tokens (a tree stays one: parents come first)."""
        if size >= len(self.tokens):
            return self
        return Draft(
            self.tokens[:size],
            None if self.parents is None else self.parents[:size],
            None if self.q is None else self.q[:size],
            None if self.confidence is None else self.confidence[:size],
            self.depth,
        )

    def behind(self, size: int) -> Draft:
        """What follows the first tokens of a chain that was chosen."""
        assert self.parents is None and self.q is None, "a chain of chosen tokens"
        sure = None if self.confidence is None else self.confidence[size:]
        return Draft(self.tokens[size:], confidence=sure)

    @property
    def depth(self) -> int:
        """How deep was drafted."""
        return max(self.num_levels, self.levels)

    @property
    def levels(self) -> int:
        """How deep these tokens reach."""
        if self.parents is None:
            return len(self.tokens)
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == -1 else depths[parent] + 1)
        return max(depths, default=0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn: logits over temperature, then the fewest tokens that hold top_p."""

    temperature: float = 1.0
    top_p: float = 1.0

    def probabilities(self, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        p = torch.softmax(logits.float() / self.temperature, -1)
        if self.top_p >= 1.0:
            return p
        best, order = p.sort(dim=-1, descending=True)
        # A token is kept if those before it do not yet hold the mass.
        best = best.masked_fill(best.cumsum(-1) - best >= self.top_p, 0.0)
        kept = torch.zeros_like(p).scatter(-1, order, best)
        return kept / kept.sum(-1, keepdim=True)


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


def verify_greedy(draft: Draft, argmax: Sequence[int]) -> tuple[list[int], int]:
    """Check a draft against the verifier's own choices.

    Args:
        argmax: n + 1 tokens: the verifier's choice at the root, then after each drafted token.

    Returns:
        The drafted tokens that hold, as indices from the root on, and the verifier's token after
        them (the bonus token).
    """
    assert len(argmax) == len(draft) + 1, f"{len(draft)} drafts, {len(argmax)} choices"
    if draft.parents is None:
        accepted = accepted_prefix_length(draft.tokens, argmax)
        return list(range(accepted)), argmax[accepted]
    path: list[int] = []
    node = -1
    while True:
        token = argmax[node + 1]
        held = next((i for i in draft.children(node) if draft.tokens[i] == token), None)
        if held is None:
            return path, token
        path.append(held)
        node = held


def verify_sampled(
    draft: Draft, p: Float[Tensor, "n1 V"], generator: torch.Generator | None = None
) -> tuple[list[int], int]:
    """Check a draft so that what is said follows the verifier's distribution exactly.

    The children of a node are tried in turn. One that was drawn from q is accepted with
    probability min(1, p/q); after a rejection p becomes (p - q)+, normalised, which the next one is
    held against and, after the last, the token is drawn from (Leviathan et al., arXiv:2211.17192,
    algorithm 1; for trees SpecInfer's multi-step sampling, arXiv:2305.09781). A token that was
    chosen, not drawn, has a q of one at itself: accepted with probability p, else ruled out.

    Args:
        p: the verifier's probabilities at the root, then after each drafted token.
        generator: random numbers, on the device of ``p``; not the one the drafts were drawn with.

    Returns:
        The drafted tokens that hold, as indices from the root on, and the token after them.
    """
    assert len(p) == len(draft) + 1, "one row of p more than drafts"
    path: list[int] = []
    node = -1
    while True:
        rest = p[node + 1]
        for child in draft.children(node):
            token = draft.tokens[child]
            q = one_hot(token, rest) if draft.q is None else draft.q[child]
            chance = torch.rand((), generator=generator, device=p.device)
            if chance * q[token] < rest[token]:
                path.append(child)
                node = child
                break
            rest = residual(rest, q)
        else:
            return path, draw(rest, generator)


def residual(p: Float[Tensor, " V"], q: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """(p - q)+, normalised; p itself where the two are equal."""
    rest = (p - q).clamp(min=0.0)
    total = rest.sum()
    return rest / total if total > 0 else p


def one_hot(token: int, like: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """The distribution of a token that was chosen without chance."""
    q = torch.zeros_like(like)
    q[token] = 1.0
    return q


def draw(p: Float[Tensor, " V"], generator: torch.Generator | None = None) -> int:
    """A token with probabilities ``p``."""
    return int(torch.multinomial(p, 1, generator=generator))


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
