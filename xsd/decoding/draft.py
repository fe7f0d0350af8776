"""Who guesses the verifier's next tokens in decode: a head, in chains or trees.

Nothing here is rolled back explicitly: a head's cache is cut to the verifier's own rows before
every cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.cache import AdapterCache
from xsd.adapters.compiled import CompiledCache, Shape, Vocabulary
from xsd.adapters.rows import Siblings, StepInputs
from xsd.decoding.accept import Draft, Sampling, draw
from xsd.decoding.config import MAX_GAMMA
from xsd.decoding.draws import Draws
from xsd.decoding.policy import Policy
from xsd.decoding.reader import DrafterReader
from xsd.decoding.tables import VerifierTables, cast_to
from xsd.decoding.tree import DraftTree
from xsd.decoding.unread import Unread
from xsd.errors import XsdError

READ_TOKENS_BYTES = 1 << 28
"""A head reads all token embeddings in advance unless they are larger."""


@runtime_checkable
class Head(Protocol):
    """Drafts in decode: an adapter (``HeadDrafter``) or a control."""

    reads_drafter: bool
    """Whether ``begin`` needs a reader."""

    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        """A sample begins."""

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        """What follows ``tokens``, at most ``gamma`` deep; states of the last m of them."""


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How a head drafts."""

    tree_width: int = 0
    """Branches a node and nodes a level of a draft tree; 0: chains."""
    tree_nodes: int = 12
    """Largest tree that is verified."""
    sampling: Sampling | None = None
    """Draw the drafts of a chain like this; None: take the likeliest, as trees always do."""
    draws: Draws | None = None
    """What to draw them with: the engine's (``Engine.draft_draws``), which names every answer."""


class HeadDrafter:
    """A head on the verifier's states: a few rows in, a chain or a tree of drafts out."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_new_tokens: int,
        options: HeadOptions | None = None,
        policy: Policy | None = None,
    ) -> None:
        """
        Raises:
            XsdError: the tree is too wide for the head.
        """
        self.head = head
        self.tables = tables
        self.options = options or HeadOptions()
        self.policy = policy or Policy()
        self.max_length = max_new_tokens + MAX_GAMMA * max(1, self.options.tree_width)
        row = head.row
        self._reads_verifier = "verifier" in row.streams
        self._reads_token = "token" in row.streams
        self.reads_drafter = "drafter" in row.streams
        # E2 attends to e[<= t + 1]: the drafter has read the token just chosen.
        self._ahead = 1 if head.memory == "drafter" else 0
        self._kept: AdapterCache | CompiledCache | None = None
        self._check_tree()
        drawn = self.options.sampling is not None
        assert drawn == (self.options.draws is not None), "drawing takes random numbers"
        self._tokens = tables.embedding
        self._is_read = self._reads_token and self._tokens.nbytes <= READ_TOKENS_BYTES
        if self._is_read:
            with torch.no_grad():
                self._tokens = head.read_tokens(cast_to(head, self._tokens))

    @torch.inference_mode()
    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        """Start a sample; ``visual`` and ``reader`` only where the level's row asks for them."""
        visual = None if visual is None else cast_to(self.head, visual[None])
        if self._kept is None:
            self._kept = self.head.new_cache(1, self.max_length, visual)
        else:
            self._kept.begin_sample(visual)
        self._reader = reader

    def _check_tree(self) -> None:
        """Raise XsdError where only a narrower tree would fit the head's learned positions."""
        width, num_positions = self.options.tree_width, self.head.config.max_positions
        num_said = self.max_length - MAX_GAMMA * max(1, width)
        fits = (num_positions - num_said) // MAX_GAMMA
        if width > fits >= 1:
            raise XsdError(
                f"tree_width={width}: {MAX_GAMMA} levels of {width} nodes behind {num_said} tokens "
                f"exceed the head's max_positions={num_positions}; tree_width may be 1 to {fits}"
            )

    @torch.inference_mode()
    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        """Draft what follows ``tokens``, at most ``gamma`` deep.

        Args:
            tokens: everything said so far, ``y[0..t]``.
            states: the verifier's states of the last ``m`` of them, ``v[t-m+1..t]``; earlier rows
                came in earlier cycles.
        """
        sequence = list(tokens)
        start = len(sequence) - states.shape[0]
        self._cache.length = start
        if self.vocabulary is not None and isinstance(self._cache, CompiledCache):
            if not self.reads_drafter:
                return self._compiled(self._cache, sequence[start:], states, gamma)
            reader = self._reader
            if reader is not None and reader.is_compiled and not self.options.tree_width:
                states = states if self._reads_verifier else torch.zeros_like(states)
                depth = self.policy.whole_depth(gamma)
                found, sure = reader.draft_coupled(
                    self._cache, sequence, start, states, depth, self.vocabulary, shift=1
                )
                return Draft(found, confidence=sure)
        out = self._step(sequence, start, len(sequence), cast_to(self.head, states[None]))[:, -1:]
        if self.options.tree_width:
            return self._grow_tree(len(sequence), out, gamma)
        return self._extend_chain(sequence, out, gamma)

    def unread(
        self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int
    ) -> Unread | None:
        """``propose`` that leaves the draft on the device; None: drafts are made step by step."""
        return None

    def shape(self, gamma: int) -> Shape:
        """How large a draft of so many levels may be."""
        options, asks = self.options, self.policy.asks_confidence
        if options.tree_width:
            return Shape(gamma, options.tree_width, options.tree_nodes)
        return Shape(gamma, is_sure=not asks)

    def _compiled(self, cache: CompiledCache, said: list[int], states: Tensor, gamma: int) -> Draft:
        assert self.vocabulary is not None
        shape = self.shape(gamma)
        states = states if self._reads_verifier else torch.zeros_like(states)
        found = cache.draft(said, states, self.vocabulary, shape, self.policy.rule)
        return Draft(
            found.tokens.tolist(),
            found.parents.tolist() if shape.width > 1 else None,
            None,
            None if shape.is_sure else found.confidence.tolist(),
            found.num_levels,
        )

    def _extend_chain(self, sequence: list[int], out: Tensor, gamma: int) -> Draft:
        end = len(sequence)
        chances = self.chances(end, gamma)
        confidence: list[float] = []
        rows: list[Tensor] = []
        joint = 1.0
        while True:
            drafted = len(sequence) - end
            chance = None if chances is None else chances[drafted]
            token, sure, q = self._guess(out, chance)
            sequence.append(token)
            confidence.append(sure)
            if q is not None:
                rows.append(q)
            joint *= self.policy.chance(sure)
            if drafted + 1 == gamma or token in self.tables.eos_ids:
                break
            if not self.policy.go_on(joint, drafted + 1):
                break
            out = self._step(sequence, end + drafted, end + drafted + 1, out)
        return Draft(
            sequence[end:],
            None,
            torch.stack(rows) if rows else None,
            confidence if self.policy.asks_confidence else None,
        )

    def chances(self, num_said: int, gamma: int) -> Float[Tensor, " gamma"] | None:
        """What a chain behind so many tokens is drawn with; None: it is chosen."""
        draws = self.options.draws
        return None if draws is None else draws.behind(num_said, gamma)

    def _guess(
        self, out: Float[Tensor, "1 1 Dv"], chance: Float[Tensor, ""] | None
    ) -> tuple[int, float, Tensor | None]:
        """A token, how probable it is, and what it was drawn from (None: it is the likeliest)."""
        sampling = self.options.sampling
        if sampling is None and not self.policy.asks_confidence:
            return self.tables.choose(out)[0], 1.0, None
        logits = self.tables.score(out)[0, 0]
        if sampling is not None:
            q = sampling.probabilities(logits)
            assert chance is not None
            token = int(draw(q, chance))
            return token, float(q[token]), q
        best, index = torch.softmax(logits, -1).max(-1)
        return int(index), float(best), None

    def _grow_tree(self, base: int, out: Tensor, gamma: int) -> Draft:
        """Level by level the likeliest nodes branch; of all, the likeliest are kept (EAGLE-2,
        arXiv:2406.16858). The head's rows of one level are one pass."""
        tree = DraftTree(base)
        width, policy = self.options.tree_width, self.policy
        frontier = [-1]
        for depth in range(1, gamma + 1):
            best, ids = torch.softmax(self.tables.score(out)[0], -1).topk(width)
            new = tree.branch(frontier, best.tolist(), ids.tolist(), policy)
            open_ = [i for i in new if tree.tokens[i] not in self.tables.eos_ids]
            rows = tree.best(open_, width)
            rows = list(takewhile(partial(tree.goes_on, policy), rows))
            if depth == gamma or not rows:
                break
            states = out[:, [frontier.index(tree.parents[i]) for i in rows]]
            inputs = StepInputs(
                None,
                states if self._reads_verifier else None,
                self._token_rows([tree.tokens[i] for i in rows]),
            )
            visible = tree.visible(rows, self._cache.length).to(states.device)
            out = self.head.step(inputs, self._cache, Siblings(base + depth - 1, visible))
            frontier = rows
        return tree.draft(self.options.tree_nodes, depth)

    def _step(
        self, sequence: list[int], start: int, stop: int, states: Float[Tensor, "1 m Dv"]
    ) -> Float[Tensor, "1 m Dv"]:
        drafter = None
        if self.reads_drafter:
            assert self._reader is not None
            first = 0 if start == 0 else start + self._ahead
            read = self._reader.states(sequence, first, stop + self._ahead)
            drafter = cast_to(self.head, read[None])
        token = self._token_rows(sequence[start:stop]) if self._reads_token else None
        verifier = states if self._reads_verifier else None
        return self.head.step(StepInputs(drafter, verifier, token), self._cache)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """For drafts that are compiled; None: they cannot be, or are drawn."""
        knows = self._is_read or not self._reads_token
        if not knows or self.options.sampling is not None:
            return None
        return self.tables.vocabulary(self._tokens if self._is_read else None)

    @property
    def compiled(self) -> CompiledCache | None:
        """The rows of the sample that has begun, where whole cycles can be compiled."""
        can = self.vocabulary is not None and not self.reads_drafter
        return self._cache if can and isinstance(self._cache, CompiledCache) else None

    def timed_draft(self, gamma: int, num_new: int = 4) -> Callable[[], object]:
        """A draft of all of ``gamma`` levels behind so many new tokens, to be timed; a sample must
        have begun, and its next cycle does not see it."""
        cache, vocabulary = self.compiled, self.vocabulary
        assert cache is not None and vocabulary is not None
        endless = replace(vocabulary, eos=vocabulary.eos[:0])
        shape = replace(self.shape(gamma), is_sure=False)
        states = torch.zeros(num_new, cache.head.width)
        cache.length = 0
        ids, shares = np.empty((2, shape.num_guesses), np.int64), np.empty((2, shape.num_guesses))
        arrays = (*ids, *shares)
        return cache.drafting([0] * num_new, states, endless, shape, Policy.rule, arrays)

    @property
    def _cache(self) -> AdapterCache | CompiledCache:
        assert self._kept is not None, "propose comes after begin"
        return self._kept

    def _token_rows(self, ids: list[int]) -> Float[Tensor, "1 R Dv"]:
        """What the head reads of these tokens."""
        # One is the common case, and a slice is cheaper than a gather.
        rows = self._tokens.narrow(0, ids[0], 1) if len(ids) == 1 else self._tokens[ids]
        return (rows if self._is_read else self.head.read_tokens(cast_to(self.head, rows)))[None]
