"""Drafts that lie on a device until the verifier has judged them: then one wait brings both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.decoding.accept import Draft
from xsd.pairs.cache import TreeRows


@dataclass(frozen=True, slots=True)
class Unread:
    """A chain, or a tree, that nobody has looked at; whoever drafts next overwrites it."""

    numbers: Float[Tensor, "fields n"]
    """Ids, and how probable each is to follow its parent; of a tree also the parents, and a
    negative probability where there was no more to guess: what comes from there on is no draft.
    In double precision, which holds all of them exactly."""
    tree: TreeRows | None = None
    """How the pass over the root and these ids branches; None: it is a chain."""
    num_levels: int = 0
    """How deep was drafted, where that may be deeper than these tokens reach."""
    q: Float[Tensor, "n V"] | None = None
    """What a chain was drawn from; None: it was chosen."""

    def __len__(self) -> int:
        return int(self.numbers.shape[1])

    @property
    def ids(self) -> Int[Tensor, " n"]:
        return self.numbers[0].long()

    def cut(self, size: int) -> Unread:
        """The first ``size`` tokens (a tree stays one: parents come first)."""
        if size >= len(self):
            return self
        tree, rows = self.tree, 1 + size
        if tree is not None:
            tree = TreeRows(tree.depths[:rows], tree.ancestors[:rows, :rows])
        q = None if self.q is None else self.q[:size]
        return Unread(self.numbers[:, :size], tree, self.num_levels or len(self), q)

    def read(self) -> Draft:
        """The draft; waits for the device."""
        return self._draft(self.numbers.tolist())

    def read_with(self, choices: Int[Tensor, " n1"]) -> tuple[Draft, list[int]]:
        """The draft, and what the verifier chooses at the root and after each of its tokens; waits
        once for both."""
        read: list[float] = torch.cat([self.numbers.flatten(), choices.double()]).tolist()
        size = len(self)
        end = size * len(self.numbers)
        fields = [read[start : start + size] for start in range(0, end, size)]
        draft = self._draft(fields)
        return draft, [int(token) for token in read[end : end + len(draft) + 1]]

    def _draft(self, fields: list[list[float]]) -> Draft:
        tokens, confidence = [int(token) for token in fields[0]], fields[1]
        if self.tree is None:
            return Draft(tokens, None, self.q, confidence, self.num_levels)
        size = sum(sure >= 0 for sure in confidence)
        parents = [int(parent) for parent in fields[2][:size]]
        return Draft(tokens[:size], parents, None, confidence[:size], self.num_levels)
