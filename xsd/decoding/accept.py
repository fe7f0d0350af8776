"""The acceptance rule, pure: what offline metrics and live decoding both go by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd.pairs.device import to_device

NOTHING = -1
"""In place of a token, where there is none."""


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
        kept = p.scatter_(-1, order, best)
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


def verify(draft: Draft, choices: Sequence[int]) -> tuple[list[int], int]:
    """Check a draft against the verifier's own choices.

    Args:
        choices: n + 1 tokens: the verifier's choice at the root, then after each drafted token,
            likeliest or drawn (``choose_sampled``).

    Returns:
        The drafted tokens that hold, as indices from the root on, and the verifier's token after
        them (the bonus token).
    """
    assert len(choices) == len(draft) + 1, f"{len(draft)} drafts, {len(choices)} choices"
    if draft.parents is None:
        accepted = accepted_prefix_length(draft.tokens, choices)
        return list(range(accepted)), choices[accepted]
    path: list[int] = []
    node = -1
    while True:
        token = choices[node + 1]
        held = next((i for i in draft.children(node) if draft.tokens[i] == token), None)
        if held is None:
            return path, token
        path.append(held)
        node = held


def choose_sampled(
    p: Float[Tensor, "*batch n1 V"],
    chances: Float[Tensor, "*batch n1 2"],
    ids: Int[Tensor, "*batch n"] | None = None,
    q: Float[Tensor, "*batch n V"] | None = None,
    parents: Sequence[int] | None = None,
) -> Int[Tensor, "*batch n1"]:
    """What the verifier says at the root and after each drafted token, drawn so that a draft holds
    as often as can be; found where ``p`` lies, and nothing waits for it.

    Behind every row the tokens that were drawn from q are tried in turn. One holds with probability
    min(1, p/q); if not, p becomes (p - q)+, normalised, which the next one is held against and,
    after the last, the token is drawn from (Leviathan et al., arXiv:2211.17192, algorithm 1; for
    trees SpecInfer's multi-step sampling, arXiv:2305.09781). So every row's token follows p,
    whichever rows ``verify`` then walks along. Tokens that were chosen, not drawn, hold where they
    are what is drawn from p: with a q of one at themselves it would be as often.

    Args:
        p: the verifier's probabilities at the root, then after each drafted token.
        chances: uniform on [0, 1), in double precision, not those that the drafts were drawn with:
            of draft i and of row i.
        ids, q: the drafts, and what each was drawn from; a q of zeros: there is none. None: they
            were chosen, or there are none.
        parents: as ``Draft.parents``, of a single draft.
    """
    if ids is None or q is None:
        return draw(p, chances[..., 1])
    rest = p.clone()
    said = torch.full_like(p[..., 0], NOTHING, dtype=torch.long)
    for nodes, rows in _turns(parents, q):
        token, drawn_from, left = ids[..., nodes], q[..., nodes, :], rest[..., rows, :]
        share, chance = (x.gather(-1, token[..., None])[..., 0] for x in (drawn_from, left))
        holds = (share > 0) & (chances[..., nodes, 0] * share < chance)
        said[..., rows] = torch.where(holds & (said[..., rows] < 0), token, said[..., rows])
        rest[..., rows, :] = residual(left, drawn_from)
    return torch.where(said < 0, draw(rest, chances[..., 1]), said)


_Index = slice | Int[Tensor, " k"]


def _turns(
    parents: Sequence[int] | None, like: Float[Tensor, "*batch n V"]
) -> Iterator[tuple[_Index, _Index]]:
    """Drafts that are tried at once, each behind a row of its own, and these rows: all that come
    first among their siblings, all that come second, and so on."""
    if parents is None:
        yield slice(like.shape[-2]), slice(like.shape[-2])
        return
    turns: list[list[int]] = []
    num_tried = Counter[int]()
    for node, parent in enumerate(parents):
        if num_tried[parent] == len(turns):
            turns.append([])
        turns[num_tried[parent]].append(node)
        num_tried[parent] += 1
    for nodes in turns:
        rows = [parents[node] + 1 for node in nodes]
        yield to_device(nodes, like.device), to_device(rows, like.device)


def residual(p: Float[Tensor, "*rows V"], q: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
    """(p - q)+, normalised; p itself where the two are equal."""
    rest = (p - q).clamp(min=0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def draw(p: Float[Tensor, "*rows V"], chance: Float[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """A token of every row with probabilities ``p``, by a number that is uniform on [0, 1).

    In double precision, for in single the rarest tokens of a large vocabulary share few numbers.
    """
    mass = p.cumsum(-1, dtype=torch.double)
    reached = mass > chance[..., None] * mass[..., -1:]
    # A GPU sums in parts, so that mass may rise, by rounding, where p is zero.
    return reached.logical_and_(p > 0).view(torch.uint8).argmax(-1)


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
