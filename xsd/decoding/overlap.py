"""Real overlap on CPUs: the drafter in a process of its own, beside the verifier's prefill.

Threads would not do: two eager models in one interpreter wait for each other's lock between
operations. The processes share a few small tensors; inside a sample they watch flags in them
(tens of microseconds), between samples the worker sleeps on a pipe and leaves all cores to the
verifier.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from jaxtyping import Float
from torch import Tensor

from xsd.adapters import checkpoint
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.ahead import NUM_WORDS, Board
from xsd.decoding.config import DecodingConfig
from xsd.decoding.draft import Head, HeadDrafter
from xsd.decoding.reader import DrafterReader, ReaderMemory
from xsd.decoding.speculator import LocalSpeculator, reads_visual
from xsd.decoding.strategies import adapter_names, goes_on
from xsd.decoding.tables import VerifierTables
from xsd.errors import XsdError
from xsd.hidden.visual import MAX_VISUAL
from xsd.pairs.base import Decoder, Media
from xsd.pairs.catalog import load_drafter
from xsd.pairs.config import PairConfig
from xsd.types import Span, Strategy

_STOP, _NUM_DRAFTS, _PROJECTED, _HANDED_OVER, _FINISH, _FAILED = range(6)
_BEGAN_NS, _READY_NS, _DRAFTED_NS = range(3)
_GONE = "the drafter process ended unexpectedly; see its output above"


class _Shared:
    """Memory that both processes see. Flags are plain integers, each written by one side only."""

    def __init__(self, width: int, max_new_tokens: int, image_bytes: int) -> None:
        room = max_new_tokens + 64
        sizes = {
            "flags": 6, "clock_ns": 3, "num_visual": 1, "progress": 2, "board": NUM_WORDS,
            "tokens": room, "drafts": room,
        }  # fmt: skip
        self.words = {
            name: torch.zeros(size, dtype=torch.int64).share_memory_()
            for name, size in sizes.items()
        }
        self.words["sure"] = torch.zeros(room, dtype=torch.float64).share_memory_()
        """How probable each of the drafts is, where the gap's adapter says so."""
        self.visual = torch.zeros(MAX_VISUAL, width).share_memory_()
        self.images = torch.zeros(image_bytes, dtype=torch.uint8).share_memory_()

    def views(self) -> dict[str, np.ndarray]:
        """Numpy views: reading a flag through them costs a tenth of a tensor's ``item``."""
        return {name: words.numpy() for name, words in self.words.items()}

    def put_images(self, images: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
        """Copy images to where the other side finds them; their shapes."""
        buffer, start = self.images.numpy(), 0
        for image in images:
            end = start + image.size
            assert end <= buffer.size, "the images of a sample are larger than was said"
            buffer[start:end].reshape(image.shape)[...] = image
            start = end
        return [image.shape for image in images]

    def get_images(self, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The images themselves, not copies: they hold until the next sample begins."""
        buffer, start, found = self.images.numpy(), 0, []
        for shape in shapes:
            end = start + int(np.prod(shape))
            found.append(buffer[start:end].reshape(shape))
            start = end
        return found


@dataclass(frozen=True)
class WorkerSetup:
    """What the worker loads: the pair's drafter and the adapters of the gap.

    The verifier is not among it: what a draft needs of that is handed over in shared memory. Nor
    are heads: they draft beside the verifier.
    """

    pair: PairConfig
    adapters: Mapping[str, Path]
    decoding: DecodingConfig
    max_prompt: int
    image_bytes: int
    """Of a sample's event images, at most."""
    num_threads: int


class DrafterProcess:
    """The worker's owner: starts it, speaks to it, ends it. Use as a context manager."""

    def __init__(self, setup: WorkerSetup, drafter: Decoder, verifier: Decoder) -> None:
        """``drafter`` and ``verifier``: this process's own. The worker loads the one anew and works
        in memory that this process's takes over; it has the other's tables and no layers of it.

        Raises:
            XsdError: shared memory is short, or the worker could not begin.
        """
        context = mp.get_context("spawn")
        tables = VerifierTables.of(verifier)
        max_new_tokens = setup.decoding.max_new_tokens
        memory = ReaderMemory.new(drafter, max_new_tokens, setup.max_prompt)
        try:
            tables.share()
            memory.share()
            self.shared = _Shared(verifier.width, max_new_tokens, setup.image_bytes)
        except RuntimeError as error:
            line = " ".join(str(error).split())
            raise XsdError(
                f"no room for the verifier's embedding and LM head in shared memory ({line}); "
                "enlarge /dev/shm, or say --overlap inline"
            ) from error
        self.connection, theirs = context.Pipe()
        given = setup, tables, memory, self.shared, theirs
        self._process = context.Process(target=_work, args=given, daemon=True, name="xsd-drafter")
        self._process.start()
        theirs.close()
        self._owes_message = True
        self._receive()
        self.reader = DrafterReader(drafter, memory)
        """Goes on from where the worker has come to."""

    def begin(self, strategy: Strategy, shapes: list[tuple[int, ...]], question: str) -> None:
        """Give the worker a sample, whose images lie in shared memory.

        Raises:
            XsdError: it is gone.
        """
        try:
            self.connection.send((strategy, shapes, question))
        except OSError as error:
            raise XsdError(_GONE) from error
        self._owes_message = True

    def end(self) -> None:
        """Wait until the worker is through with its sample, if it has one.

        Raises:
            XsdError: it failed or died; with its reason where it could give one.
        """
        self.shared.words["flags"][[_STOP, _FINISH]] = 1
        if self._owes_message:
            self._receive()

    def _receive(self) -> None:
        # Whatever comes now is all that comes: another message is the next sample's.
        self._owes_message = False
        try:
            reason = self.connection.recv()
        except (EOFError, OSError) as error:
            raise XsdError(_GONE) from error
        if reason is not None:
            raise XsdError(f"the drafter process failed: {reason}")

    def wait(self, ready: Callable[[], bool]) -> None:
        """Watch a flag; notice when nobody is there to set it."""
        flags = self.shared.words["flags"]
        spins = 0
        while not ready():
            spins += 1
            if spins % 64 == 0:
                os.sched_yield()
                if flags[_FAILED]:
                    self._receive()
                if spins % 65536 == 0 and not self._process.is_alive():
                    raise XsdError("the drafter process died; see its output above")

    def close(self) -> None:
        flags = self.shared.words["flags"]
        flags[_STOP] = flags[_FINISH] = 1
        self.connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()

    def __enter__(self) -> DrafterProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProcessSpeculator:
    """A strategy whose drafter works in ``process`` during the gap.

    Heads draft here, beside the verifier, those that read the drafter too: a round trip a cycle
    would cost more than a small drafter's steps. They take its memory over when the gap ends.
    """

    def __init__(self, strategy: Strategy, process: DrafterProcess, head: Head | None) -> None:
        self.strategy = strategy
        self._process, self._head = process, head
        self._goes_on = goes_on(strategy)
        self._views = process.shared.views()
        self._board = _board(self._views)
        gap = strategy.gap if strategy.gap_mode == "coupled" else None
        self.wants_projected = reads_visual(gap, "projected")
        self.wants_prefilled = reads_visual(strategy.head, "prefilled")

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        self._views["flags"][:] = 0
        self._views["clock_ns"][:] = 0
        self._board.begin()
        self._watch, self._question = watch, question
        self._prefilled: Tensor | None = None
        self._head_began = False
        shapes = self._process.shared.put_images(media.event_images)
        self._process.begin(self.strategy, shapes, question)

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._process.shared.visual[: len(visual)] = visual
        self._views["num_visual"][0] = len(visual)
        self._views["flags"][_PROJECTED] = 1

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._prefilled = visual

    def gap_drafts(self) -> Draft:
        """What the drafter has ready at this moment; nobody waits for another token.

        Free-running states still have to pass the adapter: that one pass is waited for.
        """
        if self.strategy.gap is None:
            return Draft([])
        if self._goes_on:
            return Draft(self._board.drafts(len(self._views["drafts"])))
        flags = self._views["flags"]
        flags[_STOP] = 1
        if self.strategy.gap_mode == "free" and self.strategy.gap != "drafter":
            self._process.wait(lambda: flags[_HANDED_OVER])
        count = int(flags[_NUM_DRAFTS])
        sure = self._views["sure"][:count].tolist()
        drafts = self._views["drafts"][:count].tolist()
        return Draft(drafts, confidence=sure if self.strategy.gap_mode == "coupled" else None)

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        if self._goes_on:
            self._board.tell(tokens)
            self._process.wait(lambda: self._board.is_current)
            return Draft(self._board.drafts(gamma))
        if self._head is None:
            return Draft([])
        self._begin_head(self._head)
        return self._head.propose(tokens, states, gamma)

    def begun_head(self) -> HeadDrafter | None:
        """The head, ready for the sample, where its whole cycles can be compiled."""
        if not isinstance(self._head, HeadDrafter) or self._head.reads_drafter:
            return None
        self._begin_head(self._head)
        return None if self._head.compiled is None else self._head

    def _begin_head(self, head: Head) -> None:
        if not self._head_began:
            reader = self._take_over() if head.reads_drafter else None
            head.begin(self._question, self._prefilled, reader)
            self._head_began = True

    def finish(self) -> list[Span]:
        self._process.end()
        began, ready, drafted = (
            (int(t) - self._watch.origin_ns) / 1e6 for t in self._views["clock_ns"]
        )
        spans = [Span("drafter", "prefill", began, ready)]
        if self.strategy.gap is not None and drafted > ready:
            spans.append(Span("drafter", "draft", ready, drafted))
        return spans

    def _take_over(self) -> DrafterReader:
        flags, reader = self._views["flags"], self._process.reader
        self._process.wait(lambda: flags[_HANDED_OVER])
        prompt_length, num_read = (int(number) for number in self._views["progress"])
        reader.take_over(prompt_length, self._views["tokens"][:num_read].tolist())
        return reader


def _board(views: Mapping[str, np.ndarray]) -> Board:
    return Board(views["board"], views["tokens"], views["drafts"])


# ---------------------------------------------------------------- the worker's side


def _work(
    setup: WorkerSetup,
    tables: VerifierTables,
    memory: ReaderMemory,
    shared: _Shared,
    connection: Connection,
) -> None:
    """The process: load once, then a sample a message, until the pipe closes.

    It answers each with one message: None, or why it failed.
    """
    torch.set_num_threads(setup.num_threads)
    try:
        worker = _Worker(setup, tables, memory, shared)
        connection.send(None)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
    while True:
        try:
            strategy, shapes, question = connection.recv()
        except EOFError:
            return
        try:
            worker.sample(strategy, shared.get_images(shapes), question)
            reason = None
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for the sample
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            # Before the message: once that is there, the flags are the next sample's.
            shared.words["flags"][_FAILED] = 1
        connection.send(reason)


class _Worker:
    def __init__(
        self, setup: WorkerSetup, tables: VerifierTables, memory: ReaderMemory, shared: _Shared
    ) -> None:
        self.setup = setup
        self.drafter = load_drafter(setup.pair, tables.vocab_size)
        self.tables, self.memory, self.shared = tables, memory, shared
        self.adapters = {
            name: checkpoint.load(path)[0].eval() for name, path in setup.adapters.items()
        }
        self.views = shared.views()
        self.parties: dict[str, LocalSpeculator] = {}

    def party(self, strategy: Strategy) -> LocalSpeculator:
        """Who drafts in the gap, built at its first use."""
        if strategy.name not in self.parties:
            in_gap = strategy if goes_on(strategy) else replace(strategy, head=None)
            self.parties[strategy.name] = LocalSpeculator(
                in_gap,
                self.drafter,
                self.tables,
                {name: self.adapters[name] for name in adapter_names(in_gap)},
                {},
                max_new_tokens=self.setup.decoding.max_new_tokens,
                max_prompt=self.setup.max_prompt,
                max_gap_drafts=self.setup.decoding.max_gap_drafts,
                memory=self.memory,
            )
        return self.parties[strategy.name]

    @torch.inference_mode()
    def sample(self, strategy: Strategy, images: list[np.ndarray], question: str) -> None:
        clock = self.views["clock_ns"]
        clock[_BEGAN_NS] = time.monotonic_ns()
        party = self.party(strategy)
        media = Media(images, np.zeros((0, 1, 1, 3), np.uint8))
        watch = Stopwatch(self.drafter.stack.device)
        party.start(media, question, watch)
        clock[_READY_NS] = time.monotonic_ns()
        if goes_on(strategy):
            self._go_on(party)
        elif strategy.gap is not None:
            self._draft_in_gap(party)
        self._hand_over(party, watch)

    def _draft_in_gap(self, party: LocalSpeculator) -> None:
        flags, drafts, sure = (self.views[name] for name in ("flags", "drafts", "sure"))
        if party.wants_projected and self._wait_for(_PROJECTED):
            party.on_projected(self._projected())
        found: list[int] = []
        postponed = party.strategy.gap_mode == "free" and party.gap_adapter is not None
        if not flags[_STOP]:
            for token in party.gap_tokens():
                found.append(token)
                if not postponed:
                    drafts[len(found) - 1] = token
                    if party.coupled is not None:
                        sure[len(found) - 1] = party.coupled.confidence[-1]
                    flags[_NUM_DRAFTS] = len(found)
                self.views["clock_ns"][_DRAFTED_NS] = time.monotonic_ns()
                if flags[_STOP]:
                    break
        if postponed:
            # The verifier waits from here on; an adapter pass over all states is all that is left.
            self._wait_for(_STOP)
            adapted = party.finish_gap(found).tokens
            drafts[: len(adapted)] = adapted
            flags[_NUM_DRAFTS] = len(adapted)
            self.views["clock_ns"][_DRAFTED_NS] = time.monotonic_ns()

    def _go_on(self, party: LocalSpeculator) -> None:
        """Draft behind the prompt and behind what is said until the sample is finished."""
        flags, clock = self.views["flags"], self.views["clock_ns"]
        if party.wants_projected:
            if not self._wait_for(_PROJECTED):
                return
            party.on_projected(self._projected())
        gamma = party.strategy.gamma
        _board(self.views).draft(
            party.begin_coupled(),
            first=party.max_gap_drafts,
            # One draft is in the verifier's hands, the next one begins behind its own token.
            ahead=2 * gamma + 1,
            is_over=lambda: bool(flags[_FINISH]),
            pause=os.sched_yield,
        )
        clock[_DRAFTED_NS] = time.monotonic_ns()

    def _hand_over(self, party: LocalSpeculator, watch: Stopwatch) -> None:
        """Say how far the drafter has read; its memory is the other side's from here on."""
        assert party.reader is not None
        prompt_length, read = party.reader.progress
        self.views["tokens"][: len(read)] = read
        self.views["progress"][:] = prompt_length, len(read)
        watch.ms()  # A GPU has written what it was told to.
        self.views["flags"][_HANDED_OVER] = 1

    def _wait_for(self, flag: int) -> bool:
        """Until the verifier sets ``flag``; False when the sample ended before."""
        flags = self.views["flags"]
        while not flags[flag]:
            if flags[_FINISH] or (flags[_STOP] and flag != _STOP):
                return bool(flags[flag])
            os.sched_yield()
        return True

    def _projected(self) -> Float[Tensor, "K Dv"]:
        visual: Tensor = self.shared.visual[: int(self.views["num_visual"][0])]
        return visual.clone()
