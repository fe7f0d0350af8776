"""Between the models and adapters: states on their way in, and out to logits.

Adapters compute in the precision they were trained in, whatever the models' own: states are
converted here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xsd import kernels
from xsd.adapters.base import Adapter
from xsd.adapters.compiled import Vocabulary
from xsd.pairs.base import Decoder
from xsd.pairs.choose import Chooser


def cast_to(adapter: Adapter, states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """States of a model as an adapter takes them, and where."""
    like = next(adapter.parameters())
    return states.to(like.device, like.dtype)


@dataclass(frozen=True)
class VerifierTables:
    """The parts of the verifier that a draft needs: token embeddings in, logits out.

    They hold nothing of its layers, so that a process which only drafts can be given them.
    """

    embedding: Float[Tensor, "ids Dv"]
    lm_head: Any
    """Module from states to logits of the ids that the pair shares."""
    vocab_size: int
    """How many those are."""
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, verifier: Decoder) -> VerifierTables:
        return cls(verifier.embedding, verifier.lm_head, verifier.vocab_size, verifier.eos_ids)

    def on(self, device: torch.device) -> VerifierTables:
        """These, or a copy on another device for a drafter that lies there."""
        if self.embedding.device == device:
            return self
        head = copy.deepcopy(self.lm_head).to(device)
        return VerifierTables(self.embedding.to(device), head, self.vocab_size, self.eos_ids)

    def share(self) -> None:
        """Move them, in place, to where other processes can see them.

        Raises:
            RuntimeError: there is no room.
        """
        self.embedding.share_memory_()
        self.lm_head.share_memory()

    def choose(self, hidden: Float[Tensor, "*rows Dv"]) -> list[int]:
        """The likeliest token of every row, of states in an adapter's own precision."""
        return self.chooser(hidden.to(self.embedding.dtype))

    @cached_property
    def chooser(self) -> Chooser:
        return Chooser(self.lm_head)

    def vocabulary(self, read: Float[Tensor, "ids Dv"] | None) -> Vocabulary | None:
        """What compiled chains need to know of the tokens; None: the LM head is not compiled.

        Args:
            read: every embedding as a head reads it; None: it reads no tokens.
        """
        panels = self.chooser.panels
        if panels is None:
            return None
        table = self.embedding[:0] if read is None else read
        eos = np.array(sorted(self.eos_ids), np.int64)
        return Vocabulary(table.numpy(), self._halved, self.vocab_size, eos)

    @cached_property
    def _halved(self) -> np.ndarray:
        """The packed LM head as drafts read it: one for all heads."""
        assert self.chooser.panels is not None
        halved: np.ndarray = kernels.halve(self.chooser.panels)
        return halved

    def score(self, hidden: Float[Tensor, "*rows Dv"]) -> Float[Tensor, "*rows V"]:
        """Logits of states in an adapter's own precision."""
        logits: Tensor = self.lm_head(hidden.to(self.embedding.dtype))
        return logits
