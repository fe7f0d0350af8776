"""Draft trees on a GPU: a whole tree is grown in one CUDA graph, and read once at its end.

Level by level the likeliest nodes branch (EAGLE-2, arXiv:2406.16858), as in ``HeadDrafter``; which
of all nodes are verified is decided on the host, from what the graph leaves behind. A tree is grown
to its full depth, as chains are: a device is no sooner done with less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.rows import StepInputs
from xsd.decoding.accept import Draft
from xsd.decoding.draft import DrafterReader, HeadDrafter, HeadOptions, VerifierTables, subtree
from xsd.decoding.graphs import MAX_FRESH, CapturedChains, fits_trees
from xsd.decoding.policy import Policy
from xsd.pairs.capture import Capture
from xsd.pairs.device import to_device


@dataclass(frozen=True)
class _Grown:
    """A captured tree and what it reads."""

    ids: Int[Tensor, " m"]
    states: Float[Tensor, "m Dv"]
    replay: Callable[[], Tensor]


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
    """Greedy trees of a head that reads the verifier's states, tokens, or both."""

    def __init__(self, head: Adapter, tables: VerifierTables, max_length: int, width: int) -> None:
        """``width``: branches a node, and nodes that branch a level."""
        super().__init__(head, tables, max_length)
        self._width = width
        self._eos = torch.tensor(sorted(tables.eos_ids), device=self.device)
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
    ) -> Float[Tensor, "4 nodes"]:
        """Token, parent (-1: the root), chance behind its parent and with all before it, of every
        node, parents first; on the device.

        Nodes that no tree would hold have a negative last chance. Arguments as ``draft``'s.
        """
        num_rows = len(states)
        self._start.fill_(start)
        given = to_device(ids, self.device)
        if num_rows > MAX_FRESH:
            return self._grow(given, states.to(self._dtype), depth)
        tree = self._trees.get((num_rows, depth))
        if tree is None:
            read, seen = given.clone(), states.to(self._dtype, copy=True)
            capture = Capture(lambda: self._grow(read, seen, depth), self._lane)
            tree = self._trees[num_rows, depth] = _Grown(read, seen, capture.replay)
        else:
            tree.ids.copy_(given, non_blocking=True)
            tree.states.copy_(states)
        return tree.replay()

    def _grow(
        self, ids: Int[Tensor, " m"], states: Float[Tensor, "m Dv"], depth: int
    ) -> Float[Tensor, "4 nodes"]:
        width, device = self._width, self.device
        at = self._start + torch.arange(len(ids), device=device)
        out = self._step(ids, states[None], at)[0, -1:]
        base = at[-1:] + 1
        root = torch.full((1,), -1, device=device)
        nodes = [self._branch(out, root, torch.ones(1, device=device))]
        num_slots, first = max(1, depth - 1) * width, 0
        level: _Level | None = None
        for grown in range(depth - 1):
            level = self._choose(nodes[-1], out, level, first, grown, num_slots)
            out = self._siblings(level, base, grown)
            first += nodes[-1].shape[1]
            nodes.append(self._branch(out, level.number, level.joint))
        return torch.cat(nodes, dim=1)

    def _branch(
        self, out: Float[Tensor, "R Dv"], parents: Int[Tensor, " R"], joint: Float[Tensor, " R"]
    ) -> Float[Tensor, "4 nodes"]:
        """The likeliest followers of every row."""
        sure, ids = torch.softmax(self._tables.score(out).float(), -1).topk(self._width)
        followed = parents.repeat_interleave(self._width).float()
        chances = joint[:, None] * sure
        return torch.stack([ids.flatten().float(), followed, sure.flatten(), chances.flatten()])

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


class CapturedTreeHead(HeadDrafter):
    """``HeadDrafter`` whose trees are captured; where nodes branch goes by the head's own chances,
    and what is kept by the policy's."""

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
        width = self.options.tree_width
        length = max_new_tokens + 16 * (1 + width)
        self._captured = CapturedTrees(head, tables, min(length, head.config.max_positions), width)

    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        self._captured.begin(visual)

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        start = len(tokens) - len(states)
        nodes = self._captured.grow(tokens[start:], states, start, gamma).cpu()
        ids, parents = nodes[:2].long().tolist()
        sure, in_tree = nodes[2].tolist(), (nodes[3] >= 0).tolist()
        joint: list[float] = []
        for parent, chance in zip(parents, sure, strict=True):
            before = 1.0 if parent == -1 else joint[parent]
            joint.append(before * self.policy.chance(chance))
        likely = sorted((i for i, held in enumerate(in_tree) if held), key=lambda i: -joint[i])
        kept = likely[: self.options.tree_nodes]
        confidence = [sure[node] for node in kept] if self.policy.asks_confidence else None
        draft = subtree(ids, parents, kept)
        return replace(draft, confidence=confidence, num_levels=gamma)
