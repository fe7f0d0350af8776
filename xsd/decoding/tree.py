"""A draft that branches, while it grows and as what of it is verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from xsd.decoding.accept import Draft
from xsd.decoding.policy import Policy


class DraftTree:
    """A draft tree while it grows; nodes are numbered as they come, parents first."""

    def __init__(self, base: int) -> None:
        self.base = base
        """Head rows before the tree's."""
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.confidence: list[float] = []
        self.joint: list[float] = []
        self._slots: dict[int, int] = {}
        """Nodes that the head has read, and which of its rows they are."""

    def branch(
        self,
        frontier: list[int],
        confidence: list[list[float]],
        tokens: list[list[int]],
        policy: Policy,
    ) -> list[int]:
        """Give every node of the frontier its likeliest followers; their numbers."""
        first = len(self.tokens)
        for parent, sure, ids in zip(frontier, confidence, tokens, strict=True):
            before = 1.0 if parent == -1 else self.joint[parent]
            self.parents += [parent] * len(ids)
            self.tokens += ids
            self.confidence += sure
            self.joint += [before * policy.chance(p) for p in sure]
        return list(range(first, len(self.tokens)))

    def best(self, nodes: list[int], size: int) -> list[int]:
        return sorted(nodes, key=lambda i: -self.joint[i])[:size]

    def goes_on(self, policy: Policy, node: int) -> bool:
        # What is likelier is verified first.
        rank = sum(joint >= self.joint[node] for joint in self.joint)
        return policy.go_on(self.joint[node], rank)

    def visible(self, rows: list[int], length: int) -> Bool[Tensor, "R end"]:
        """Cached rows that each of ``rows`` follows, appended to ``length`` others."""
        for slot, node in enumerate(rows, start=length):
            self._slots[node] = slot
        visible = torch.zeros(len(rows), length + len(rows), dtype=torch.bool)
        visible[:, : self.base] = True
        for row, node in enumerate(rows):
            while node != -1:
                visible[row, self._slots[node]] = True
                node = self.parents[node]
        return visible

    def draft(self, size: int, num_levels: int) -> Draft:
        """The likeliest ``size`` nodes; a node is no likelier than its parent, so they connect."""
        kept = self.best(list(range(len(self.tokens))), size)
        confidence = [self.confidence[node] for node in kept]
        draft = subtree(self.tokens, self.parents, kept)
        return replace(draft, confidence=confidence, num_levels=num_levels)


def subtree(tokens: Sequence[int], parents: Sequence[int], kept: Sequence[int]) -> Draft:
    """The nodes ``kept``, each behind its parent, as a draft."""
    number = {-1: -1} | {node: i for i, node in enumerate(kept)}
    return Draft([tokens[node] for node in kept], [number[parents[node]] for node in kept])
