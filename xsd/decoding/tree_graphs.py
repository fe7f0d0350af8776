"""Draft trees on a GPU: a whole tree is one CUDA graph, and nothing of it is read on its way.

Level by level the likeliest nodes branch (EAGLE-2, arXiv:2406.16858), as in ``HeadDrafter``; the
graph also decides which of all nodes are kept and how the pass over them branches, so that they
can be verified before anybody has read them. A tree is grown to its full depth, as chains are: a
device is no sooner done with less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.rows import StepInputs
from xsd.decoding.accept import Draft
from xsd.decoding.config import MAX_TREE_NODES
from xsd.decoding.draft import HeadDrafter, HeadOptions
from xsd.decoding.graphs import CapturedChains, fits_trees
from xsd.decoding.policy import Policy
from xsd.decoding.reader import DrafterReader
from xsd.decoding.tables import VerifierTables
from xsd.decoding.unread import Unread
from xsd.kernels import rule as rules
from xsd.pairs.cache import TreeRows
from xsd.pairs.capture import Capture
from xsd.pairs.device import to_device

Kept = tuple[Float[Tensor, "3 n"], Int[Tensor, " n1"], Bool[Tensor, "n1 n1"]]
"""A tree as it is verified: its numbers, and how the pass over it branches (see ``Unread``)."""


@dataclass(frozen=True)
class _Grown:
    """A captured tree and what it reads."""

    ids: Int[Tensor, " m"]
    states: Float[Tensor, "m Dv"]
    replay: Callable[[], Kept]


@dataclass(frozen=True)
class _Level:
    """The nodes that branch next: their numbers, chances, tokens, states, and their branches."""

    number: Int[Tensor, " width"]
    joint: Float[Tensor, " width"]
    ids: Int[Tensor, " width"]
    states: Float[Tensor, "width Dv"]
    lineage: Bool[Tensor, "width slots"]
    """Which of the tree's rows each of them follows."""


class CapturedTrees(CapturedChains):
    """Trees of the likeliest tokens of a head that reads the verifier's states, tokens, or both."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_length: int,
        options: HeadOptions,
        policy: Policy,
    ) -> None:
        super().__init__(head, tables, max_length)
        self._width = options.tree_width
        self._num_kept = min(options.tree_nodes, MAX_TREE_NODES)
        self._eos = torch.tensor(sorted(tables.eos_ids), device=self.device)
        self._chances = _Chances(policy, self.device)
        self._trees: dict[tuple[int, int], _Grown] = {}

    @torch.inference_mode()
    def begin(
        self, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None = None
    ) -> None:
        before = self._rows.memory
        super().begin(visual, reader)
        if self._rows.memory is not before:
            self._trees.clear()

    @torch.inference_mode()
    def grow(
        self, ids: Sequence[int], states: Float[Tensor, "m Dv"], start: int, depth: int
    ) -> Kept:
        """The likeliest nodes, parents first, on the device; nothing waits for it.

        Arguments as ``draft``'s; the next tree of this shape overwrites the result.
        """
        self._chances.follow()
        given, states = self._catch_up(to_device(ids, self.device), states, start, depth)
        tree = self._trees.get((len(given), depth))
        if tree is None:
            read, seen = given.clone(), states.to(self._dtype, copy=True)
            capture = Capture(lambda: self._grow(read, seen, depth), self._lane)
            tree = self._trees[len(given), depth] = _Grown(read, seen, capture.replay)
        else:
            tree.ids.copy_(given, non_blocking=True)
            tree.states.copy_(states)
        return tree.replay()

    def _grow(self, ids: Int[Tensor, " m"], states: Float[Tensor, "m Dv"], depth: int) -> Kept:
        width, device = self._width, self.device
        at = self._start + torch.arange(len(ids), device=device)
        out = self._step(ids, states[None], at)[0, -1:]
        base = at[-1:] + 1
        root = torch.full((1,), -1, device=device)
        nodes = [self._branch(out, root, torch.ones(1, dtype=torch.double, device=device))]
        num_slots, first = max(1, depth - 1) * width, 0
        level: _Level | None = None
        for grown in range(depth - 1):
            level = self._choose(nodes[-1], out, level, first, grown, num_slots)
            out = self._siblings(level, base, grown)
            first += nodes[-1].shape[1]
            nodes.append(self._branch(out, level.number, level.joint))
        return likeliest(torch.cat(nodes, dim=1), self._num_kept, depth)

    def _branch(
        self, out: Float[Tensor, "R Dv"], parents: Int[Tensor, " R"], joint: Float[Tensor, " R"]
    ) -> Float[Tensor, "4 nodes"]:
        """The likeliest followers of every row: token, parent (-1: the root), chance behind that,
        and with all before it. What follows no branch has a chance of -1."""
        sure, ids = torch.softmax(self._tables.score(out).float(), -1).topk(self._width)
        sure, before = sure.double(), joint[:, None]
        followed = parents.repeat_interleave(self._width).double()
        chances = torch.where(before < 0, -1.0, before * self._chances(sure))
        return torch.stack([ids.flatten().double(), followed, sure.flatten(), chances.flatten()])

    def _choose(
        self,
        nodes: Float[Tensor, "4 nodes"],
        out: Float[Tensor, "R Dv"],
        before: _Level | None,
        first: int,
        grown: int,
        num_slots: int,
    ) -> _Level:
        """Of a level's nodes, numbered from ``first``, those that branch: likely, and no end."""
        width = self._width
        ids, joint = nodes[0].long(), nodes[3]
        open_ = torch.where(torch.isin(ids, self._eos), -1.0, joint)
        likely, chosen = open_.topk(width)
        parent = chosen // width
        lineage = torch.zeros(width, num_slots, dtype=torch.bool, device=self.device)
        if before is not None:
            lineage = before.lineage[parent]
        own = grown * width + torch.arange(width, device=self.device)
        lineage = lineage.scatter(1, own[:, None], True)
        return _Level(first + chosen, likely, ids[chosen], out[parent], lineage)

    def _siblings(
        self, level: _Level, base: Int[Tensor, " 1"], grown: int
    ) -> Float[Tensor, "width Dv"]:
        """Outputs for rows that stand at one position, each behind its own branch."""
        width, rows = self._width, self._rows
        slots = base + grown * width + torch.arange(width, device=self.device)
        within = rows.columns - base
        is_tree = (within >= 0) & (within < level.lineage.shape[1])
        followed = level.lineage[:, within.clamp(0, level.lineage.shape[1] - 1)]
        rows.begin_tree(slots, torch.where(is_tree, followed, within < 0))
        token = None
        if self._reads_token:
            token = self._twin.read_tokens(self._tables.embedding[level.ids][None].to(self._dtype))
        states = level.states[None] if self._reads_verifier else None
        out: Tensor = self._twin.step_at(
            StepInputs(None, states, token), (base + grown).expand(width), rows
        )
        return out[0]


def likeliest(nodes: Float[Tensor, "4 nodes"], num_kept: int, depth: int) -> Kept:
    """Of a tree of so many levels the likeliest nodes, and how the pass over them branches.

    None is likelier than its parent, and of nodes as likely the first come first, so what is kept
    connects.

    Args:
        nodes: token, parent (-1: the root), chance behind that, and with all before it; parents
            first. A negative last one: no such guess; if it is kept, its chance is negative too.
    """
    likely, order = nodes[3].sort(descending=True, stable=True)
    kept = order[:num_kept]
    ids, parents, sure = nodes[:3, kept]
    # Row 0 of the pass is the root's, as entry 0 is of what tells every node's row.
    rows = torch.arange(1 + len(kept), device=nodes.device)
    row_of = torch.zeros(1 + len(order), dtype=torch.long, device=nodes.device)
    followed = row_of.scatter(0, 1 + kept, rows[1:])[1 + parents.long()]
    # Pointer jumping: what a row's farthest known ancestor knows is what the row lacks.
    ancestors, jump = rows[:, None] == rows, torch.cat([rows[:1], followed])
    for _ in range(depth.bit_length()):
        ancestors, jump = ancestors | ancestors[jump], jump[jump]
    sure = torch.where(likely[: len(kept)] < 0, -1.0, sure)
    numbers = torch.stack([ids, sure, followed.double() - 1])
    return numbers, ancestors.sum(1) - 1, ancestors


class _Chances:
    """``Policy.chance`` on a device."""

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self._rule = policy.rule
        self._is_learned = len(policy.rule[0]) > 0
        self._edges = torch.tensor(rules.EDGES, device=device)
        self._seen = torch.zeros(2, rules.NUM_BUCKETS, dtype=torch.double, device=device)

    def follow(self) -> None:
        """Go by what the policy has learned by now."""
        if self._is_learned:
            # Counts: single precision, in which they travel, holds them.
            seen = np.stack(self._rule[:2]).tolist()
            self._seen.copy_(to_device(seen, self._seen.device), non_blocking=True)

    def __call__(self, sure: Float[Tensor, "*nodes"]) -> Float[Tensor, "*nodes"]:
        if not self._is_learned:
            return sure
        bucket = (sure[..., None] >= self._edges).sum(-1)
        tried, held = self._seen[0][bucket], self._seen[1][bucket]
        return (held + rules.PRIOR * sure) / (tried + rules.PRIOR)


class CapturedTreeHead(HeadDrafter):
    """``HeadDrafter`` whose trees are captured."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_new_tokens: int,
        options: HeadOptions | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(head, tables, max_new_tokens, options, policy)
        assert fits_trees(head, self.options)
        length = max_new_tokens + 16 * (1 + self.options.tree_width)
        length = min(length, head.config.max_positions)
        self._captured = CapturedTrees(head, tables, length, self.options, self.policy)

    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        self._captured.begin(visual)

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        return self.unread(tokens, states, gamma).read()

    def unread(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Unread:
        start = len(tokens) - len(states)
        numbers, *branches = self._captured.grow(tokens[start:], states, start, gamma)
        return Unread(numbers, TreeRows(*branches), gamma)
