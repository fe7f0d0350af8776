"""Real overlap on CPUs: the drafter in a process of its own, beside the verifier's prefill.

Threads would not do: two eager models in one interpreter wait for each other's lock between
operations. The processes share a few small tensors; inside a sample they watch flags in them
(tens of microseconds), between samples the worker sleeps on a pipe and leaves all cores to the
verifier.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from jaxtyping import Float
from torch import Tensor

from xsd.adapters import checkpoint
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.config import DecodingConfig
from xsd.decoding.draft import Head, HeadDrafter, VerifierTables
from xsd.decoding.speculator import LocalSpeculator, reads_visual
from xsd.decoding.strategies import adapter_names
from xsd.errors import XsdError
from xsd.hidden.visual import MAX_VISUAL
from xsd.pairs.base import Decoder, Media
from xsd.pairs.catalog import load_drafter
from xsd.pairs.config import PairConfig
from xsd.types import Span, Strategy

_STOP, _NUM_DRAFTS, _PROJECTED, _PREFILLED, _ASKED, _ANSWERED, _FINISH, _FAILED = range(8)
_BEGAN_NS, _READY_NS, _DRAFTED_NS = range(3)


class _Shared:
    """Memory that both processes see. Flags are plain integers, each written by one side only."""

    def __init__(self, width: int, max_new_tokens: int) -> None:
        self.flags = torch.zeros(8, dtype=torch.int64).share_memory_()
        self.clock_ns = torch.zeros(3, dtype=torch.int64).share_memory_()
        self.num_visual = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.request = torch.zeros(3, dtype=torch.int64).share_memory_()
        self.tokens = torch.zeros(max_new_tokens + 64, dtype=torch.int64).share_memory_()
        self.drafts = torch.zeros(max_new_tokens + 64, dtype=torch.int64).share_memory_()
        self.states = torch.zeros(max_new_tokens + 64, width).share_memory_()
        self.visual = torch.zeros(2, MAX_VISUAL, width).share_memory_()

    def views(self) -> dict[str, np.ndarray]:
        """Numpy views: reading a flag through them costs a tenth of a tensor's ``item``."""
        names = ("flags", "clock_ns", "num_visual", "request", "tokens", "drafts")
        return {name: getattr(self, name).numpy() for name in names}


@dataclass(frozen=True)
class WorkerSetup:
    """What the worker loads: the pair's drafter and every adapter that may be asked for.

    The verifier is not among it: what a draft needs of that is handed over in shared memory.
    """

    pair: PairConfig
    adapters: Mapping[str, Path]
    templates: Mapping[str, tuple[int, ...]]
    decoding: DecodingConfig
    max_prompt: int
    num_threads: int


class DrafterProcess:
    """The worker's owner: starts it, speaks to it, ends it. Use as a context manager."""

    def __init__(self, setup: WorkerSetup, verifier: Decoder) -> None:
        """``verifier``: this process's own; the worker sees its tables and has no layers of it.

        Raises:
            XsdError: shared memory is short, or the worker could not begin.
        """
        context = mp.get_context("spawn")
        tables = VerifierTables.of(verifier)
        try:
            tables.share()
            self.shared = _Shared(verifier.width, setup.decoding.max_new_tokens)
        except RuntimeError as error:
            line = " ".join(str(error).split())
            raise XsdError(
                f"no room for the verifier's embedding and LM head in shared memory ({line}); "
                "enlarge /dev/shm, or say --overlap inline"
            ) from error
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(setup, tables, self.shared, theirs), daemon=True, name="xsd-drafter"
        )
        self._process.start()
        theirs.close()
        self.receive()

    def receive(self) -> Any:
        """The worker's next message.

        Raises:
            XsdError: it failed or died; with its reason where it could give one.
        """
        try:
            status, value = self.connection.recv()
        except EOFError as error:
            raise XsdError(
                "the drafter process ended unexpectedly; see its output above"
            ) from error
        if status != "ok":
            raise XsdError(f"the drafter process failed: {value}")
        return value

    def wait(self, ready: Callable[[], bool]) -> None:
        """Watch a flag; notice when nobody is there to set it."""
        flags = self.shared.flags
        spins = 0
        while not ready():
            spins += 1
            if spins % 64 == 0:
                os.sched_yield()
                if flags[_FAILED]:
                    self.receive()
                if spins % 65536 == 0 and not self._process.is_alive():
                    raise XsdError("the drafter process died; see its output above")

    def close(self) -> None:
        self.shared.flags[_STOP] = self.shared.flags[_FINISH] = 1
        self.connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()

    def __enter__(self) -> DrafterProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProcessSpeculator:
    """A strategy whose drafter works in ``process``.

    Heads that read nothing of the drafter stay here, beside the verifier: a round trip would cost
    more than their step.
    """

    def __init__(
        self, strategy: Strategy, process: DrafterProcess, local_head: Head | None
    ) -> None:
        self.strategy = strategy
        self._process = process
        self._local_head = local_head
        self._views = process.shared.views()
        gap = strategy.gap if strategy.gap_mode == "coupled" else None
        self.wants_projected = reads_visual(gap, "projected")
        self.wants_prefilled = reads_visual(strategy.head, "prefilled")

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        self._views["flags"][:] = 0
        self._views["clock_ns"][:] = 0
        self._watch, self._question = watch, question
        self._prefilled: Tensor | None = None
        self._head_began = False
        images = [np.ascontiguousarray(image) for image in media.event_images]
        self._process.connection.send((self.strategy, images, question))

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._share_visual(0, visual, _PROJECTED)

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._prefilled = visual
        if self._local_head is None:
            self._share_visual(1, visual, _PREFILLED)

    def gap_drafts(self) -> list[int]:
        """What the drafter has ready at this moment; nobody waits for another token.

        Free-running states still have to pass the adapter: that one pass is waited for.
        """
        if self.strategy.gap is None:
            return []
        flags = self._views["flags"]
        flags[_STOP] = 1
        if self.strategy.gap_mode == "free" and self.strategy.gap != "drafter":
            self._process.wait(lambda: flags[_ANSWERED] == -1)
        count = int(flags[_NUM_DRAFTS])
        drafts: list[int] = self._views["drafts"][:count].tolist()
        return drafts

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        if self.strategy.head is None:
            return Draft([])
        if self._local_head is not None:
            self._begin_head(self._local_head)
            return self._local_head.propose(tokens, states, gamma)
        views, shared = self._views, self._process.shared
        rows = states.shape[0]
        views["tokens"][: len(tokens)] = tokens
        shared.states[:rows] = states
        views["request"][:] = (len(tokens), rows, gamma)
        flags = views["flags"]
        asked = int(flags[_ASKED]) + 1
        flags[_ASKED] = asked
        self._process.wait(lambda: flags[_ANSWERED] == asked)
        return Draft(views["drafts"][: int(views["request"][2])].tolist())

    def begun_head(self) -> HeadDrafter | None:
        """The head, ready for the sample, where its whole cycles can be compiled."""
        if not isinstance(self._local_head, HeadDrafter):
            return None
        self._begin_head(self._local_head)
        return None if self._local_head.compiled is None else self._local_head

    def _begin_head(self, head: Head) -> None:
        if not self._head_began:
            head.begin(self._question, self._prefilled, None)
            self._head_began = True

    def finish(self) -> list[Span]:
        self._views["flags"][_STOP] = self._views["flags"][_FINISH] = 1
        self._process.receive()
        began, ready, drafted = (
            (int(t) - self._watch.origin_ns) / 1e6 for t in self._views["clock_ns"]
        )
        spans = [Span("drafter", "prefill", began, ready)]
        if self.strategy.gap is not None and drafted > ready:
            spans.append(Span("drafter", "draft", ready, drafted))
        return spans

    def _share_visual(self, row: int, visual: Tensor, flag: int) -> None:
        self._process.shared.visual[row, : len(visual)] = visual
        self._views["num_visual"][row] = len(visual)
        self._views["flags"][flag] = 1


# ---------------------------------------------------------------- the worker's side


def _work(
    setup: WorkerSetup, tables: VerifierTables, shared: _Shared, connection: Connection
) -> None:
    """The process: load once, then a sample a message, until the pipe closes."""
    torch.set_num_threads(setup.num_threads)
    try:
        worker = _Worker(setup, tables, shared)
        connection.send(("ok", None))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
        raise
    while True:
        try:
            strategy, images, question = connection.recv()
        except EOFError:
            return
        try:
            worker.sample(strategy, images, question)
            connection.send(("ok", None))
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))
            shared.flags[_FAILED] = 1
            raise


class _Worker:
    def __init__(self, setup: WorkerSetup, tables: VerifierTables, shared: _Shared) -> None:
        self.setup = setup
        self.drafter = load_drafter(setup.pair, tables.vocab_size)
        self.tables = tables
        self.adapters = {
            name: checkpoint.load(path)[0].eval() for name, path in setup.adapters.items()
        }
        self.shared = shared
        self.views = shared.views()
        self.parties: dict[str, LocalSpeculator] = {}

    def party(self, strategy: Strategy) -> LocalSpeculator:
        """The strategy's drafting party, built at its first use."""
        if strategy.name not in self.parties:
            self.parties[strategy.name] = LocalSpeculator(
                strategy,
                self.drafter,
                self.tables,
                {name: self.adapters[name] for name in adapter_names(strategy)},
                self.setup.templates,
                max_new_tokens=self.setup.decoding.max_new_tokens,
                max_prompt=self.setup.max_prompt,
                max_gap_drafts=self.setup.decoding.max_gap_drafts,
            )
        return self.parties[strategy.name]

    @torch.inference_mode()
    def sample(self, strategy: Strategy, images: list[np.ndarray], question: str) -> None:
        clock = self.views["clock_ns"]
        clock[_BEGAN_NS] = time.monotonic_ns()
        party = self.party(strategy)
        media = Media(images, np.zeros((0, 1, 1, 3), np.uint8))
        party.start(media, question, Stopwatch(self.drafter.stack.device))
        clock[_READY_NS] = time.monotonic_ns()
        if strategy.gap is not None:
            self._draft_in_gap(party)
        self._serve_head(party)

    def _draft_in_gap(self, party: LocalSpeculator) -> None:
        flags, drafts = self.views["flags"], self.views["drafts"]
        if party.wants_projected and self._wait_for(_PROJECTED):
            party.on_projected(self._visual(0))
        found: list[int] = []
        postponed = party.strategy.gap_mode == "free" and party.gap_adapter is not None
        if not flags[_STOP]:
            for token in party.gap_tokens():
                found.append(token)
                if not postponed:
                    drafts[len(found) - 1] = token
                    flags[_NUM_DRAFTS] = len(found)
                self.views["clock_ns"][_DRAFTED_NS] = time.monotonic_ns()
                if flags[_STOP]:
                    break
        if postponed:
            # The verifier waits from here on; an adapter pass over all states is all that is left.
            self._wait_for(_STOP)
            adapted = party.finish_gap(found)
            drafts[: len(adapted)] = adapted
            flags[_NUM_DRAFTS] = len(adapted)
            flags[_ANSWERED] = -1
            self.views["clock_ns"][_DRAFTED_NS] = time.monotonic_ns()

    def _serve_head(self, party: LocalSpeculator) -> None:
        """Answer requests for drafts until the sample is finished."""
        flags, request = self.views["flags"], self.views["request"]
        served = 0
        needs_reader = party.head is not None and party.head.reads_drafter
        while True:
            if not needs_reader:
                return
            while flags[_ASKED] == served:
                if flags[_FINISH]:
                    return
                os.sched_yield()
            if party.wants_prefilled and not served:
                party.on_prefilled(self._visual(1))
            num_tokens, rows, gamma = (int(value) for value in request)
            tokens = self.views["tokens"][:num_tokens].tolist()
            drafts = party.propose(tokens, self.shared.states[:rows].clone(), gamma)
            self.views["drafts"][: len(drafts)] = drafts.tokens
            request[2] = len(drafts)
            served += 1
            flags[_ANSWERED] = served

    def _wait_for(self, flag: int) -> bool:
        """Until the verifier sets ``flag``; False when the sample ended before."""
        flags = self.views["flags"]
        while not flags[flag]:
            if flags[_FINISH] or (flags[_STOP] and flag != _STOP):
                return bool(flags[flag])
            os.sched_yield()
        return True

    def _visual(self, row: int) -> Float[Tensor, "K Dv"]:
        visual: Tensor = self.shared.visual[row, : int(self.views["num_visual"][row])]
        return visual.clone()
