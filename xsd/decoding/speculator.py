"""The drafting party of one strategy, as the engine calls it; here in the engine's own process.

``overlap.ProcessSpeculator`` is the same party with its drafter in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.catalog import LEVELS
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.ahead import CoupledDrafter
from xsd.decoding.coupled_graphs import coupled_drafter
from xsd.decoding.draft import Head, HeadDrafter
from xsd.decoding.graphs import head_drafter
from xsd.decoding.reader import DrafterReader, ReaderMemory, adapt_free, free_tokens
from xsd.decoding.strategies import adapter_names, goes_on, needs_drafter
from xsd.decoding.tables import VerifierTables
from xsd.decoding.unread import Unread
from xsd.errors import XsdError
from xsd.pairs.base import Decoder, Media
from xsd.types import Span, Strategy


@runtime_checkable
class Speculator(Protocol):
    """What the engine asks of whoever drafts, in this order, once a sample."""

    wants_projected: bool
    wants_prefilled: bool

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        """A sample begins; ``watch`` is its clock."""

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        """The verifier's visual tokens exist; its prefill has yet to run."""

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        """The verifier has read them."""

    def gap_drafts(self) -> Draft:
        """Stop drafting in the gap and hand over what is ready, from answer position 0."""

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        """Draft what follows ``tokens``; ``states`` are the verifier's of its last m."""

    def finish(self) -> list[Span]:
        """The answer is complete, or has failed (here perhaps, or in ``start``); what the drafter
        did, and when. Nothing is done for the sample from here on."""


class LocalSpeculator:
    """All drafting in this process, one thing after another: its time counts in full."""

    def __init__(
        self,
        strategy: Strategy,
        drafter: Decoder,
        tables: VerifierTables,
        adapters: Mapping[str, Adapter],
        templates: Mapping[str, Sequence[int]],
        *,
        max_new_tokens: int,
        max_prompt: int,
        max_gap_drafts: int,
        head: Head | None = None,
        memory: ReaderMemory | None = None,
    ) -> None:
        """
        Args:
            adapters: by name, see ``strategies.adapter_names``.
            templates: a fixed answer for every question (control ``template``).
            head: who drafts in decode; None: the strategy's adapter, with default options.
            memory: where the drafter works; None: memory of its own.
        """
        missing = [name for name in adapter_names(strategy) if name not in adapters]
        if missing:
            raise XsdError(f"config {strategy.name}: no adapter {missing[0]}; train or name it")
        self.strategy = strategy
        self.tables = tables
        self.templates = templates
        self.max_new_tokens = max_new_tokens
        self.max_gap_drafts = min(max_gap_drafts, max_new_tokens)
        self.reader: DrafterReader | None = None
        if memory is not None or needs_drafter(strategy):
            memory = memory or ReaderMemory.new(drafter, max_new_tokens, max_prompt)
            self.reader = DrafterReader(drafter, memory)
        free = strategy.gap_mode == "free"
        gap_name = f"{strategy.gap}:free" if free else strategy.gap
        self.gap_adapter = adapters.get(gap_name) if gap_name is not None else None
        # What drafts in the gap lies where the drafter does, a head where the verifier does.
        self._gap_tables = tables if self.gap_adapter is None else tables.on(drafter.stack.device)
        self.coupled: CoupledDrafter | None = None
        if self.reader is not None and self.gap_adapter is not None and not free:
            self.coupled = coupled_drafter(
                self.reader, self.gap_adapter, self._gap_tables, max_new_tokens
            )
        self.head = head
        name = strategy.head
        if head is None and name is not None and name in LEVELS:
            self.head = head_drafter(adapters[name], tables, max_new_tokens)
        self.wants_projected = (
            self.gap_adapter is not None and self.gap_adapter.row.visual == "projected"
        )
        self.wants_prefilled = reads_visual(strategy.head, "prefilled")

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        self._question = question
        self._watch = watch
        self._spans: list[Span] = []
        self._projected: Tensor | None = None
        self._prefilled: Tensor | None = None
        self._head_began = False
        if self.reader is not None:
            begin_ms = watch.ms()
            self.reader.begin(media, question)
            self._spans.append(Span("drafter", "prefill", begin_ms, watch.ms()))

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._projected = visual

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._prefilled = visual

    def gap_tokens(self) -> Iterator[int]:
        """Tokens as the drafter finds them (``finish_gap`` turns them into drafts)."""
        gap = self.strategy.gap
        if gap is None:
            return iter(())
        if gap == "template":
            return iter(self.templates.get(self._question, ())[: self.max_gap_drafts])
        assert self.reader is not None
        if self.strategy.gap_mode == "free":
            return free_tokens(self.reader, self.max_gap_drafts)
        return self._coupled_tokens()

    def begin_coupled(self) -> CoupledDrafter:
        """Behind the prompt; the drafter has read it, and visual tokens are here if wanted."""
        assert self.coupled is not None, "the strategy has no coupled gap"
        self.coupled.begin(self._projected)
        return self.coupled

    def _coupled_tokens(self) -> Iterator[int]:
        coupled = self.begin_coupled()
        while not coupled.is_done and len(coupled.tokens) < self.max_gap_drafts:
            coupled.extend(1)
            yield coupled.tokens[-1]

    def finish_gap(self, tokens: list[int]) -> Draft:
        if self.strategy.gap_mode == "free" and self.gap_adapter is not None:
            assert self.reader is not None
            return Draft(adapt_free(self.reader, tokens, self.gap_adapter, self._gap_tables))
        sure = None if self.coupled is None else self.coupled.confidence[: len(tokens)]
        return Draft(tokens, confidence=sure)

    @torch.inference_mode()
    def gap_drafts(self) -> Draft:
        if self.strategy.gap is None:
            return Draft([])
        begin_ms = self._watch.ms()
        drafts = self.finish_gap(list(islice(self.gap_tokens(), self.max_gap_drafts)))
        self._spans.append(Span("drafter", "draft", begin_ms, self._watch.ms()))
        return drafts

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        if goes_on(self.strategy):
            return self._go_on(tokens, gamma)
        if self.head is None:
            return Draft([])
        self._begin_head(self.head)
        return self.head.propose(tokens, states, gamma)

    def unread(
        self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int
    ) -> Unread | None:
        """``propose`` that leaves the draft on the device; None: it is not made in one go."""
        if goes_on(self.strategy):
            assert self.coupled is not None, "only a coupled gap goes on"
            if self._gap_tables is not self.tables:
                # On another device nothing of it can be verified unread.
                return None
            self.coupled.follow(tokens)
            return self.coupled.unread(len(tokens), gamma)
        if not isinstance(self.head, HeadDrafter):
            return None
        self._begin_head(self.head)
        return self.head.unread(tokens, states, gamma)

    @torch.inference_mode()
    def _go_on(self, tokens: Sequence[int], gamma: int) -> Draft:
        assert self.coupled is not None, "only a coupled gap goes on"
        self.coupled.follow(tokens)
        end = len(tokens) + gamma
        if len(self.coupled.tokens) < end and not self.coupled.is_done:
            self.coupled.extend(end - len(self.coupled.tokens))
        return Draft(self.coupled.tokens[len(tokens) : end])

    def begun_head(self) -> HeadDrafter | None:
        """The head, ready for the sample, where its whole cycles can be compiled."""
        if not isinstance(self.head, HeadDrafter) or self.head.reads_drafter:
            return None
        self._begin_head(self.head)
        return None if self.head.compiled is None else self.head

    def _begin_head(self, head: Head) -> None:
        if not self._head_began:
            head.begin(self._question, self._prefilled, self.reader)
            self._head_began = True

    def finish(self) -> list[Span]:
        return self._spans


def reads_visual(name: str | None, kind: str) -> bool:
    """Whether ``name`` is a level that attends to such visual states (controls do not)."""
    return name is not None and name in LEVELS and LEVELS[name].visual == kind
