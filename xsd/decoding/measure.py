"""What passes and drafts cost on this machine, measured behind a real prompt: policies go by it."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch

from xsd.clock import interleaved
from xsd.decoding.config import MAX_TREE_NODES
from xsd.decoding.costs import Costs, row_sizes
from xsd.decoding.engine import Engine
from xsd.decoding.loop import begun_head
from xsd.decoding.rote import Eager, Rote
from xsd.decoding.speculator import Speculator
from xsd.pairs.base import Media


def measure_passes(
    engine: Engine, media: Media, question: str, max_rows: int | None = None, repeats: int = 15
) -> Costs:
    """What the verifier's passes cost: the least of some timings, for whatever else a machine does
    only adds to them.

    From here on passes have as many rows as is best for their cost.

    Args:
        max_rows: longest pass; None: 24, on a GPU the largest draft tree's.
    """
    verifier = engine.verifier
    device = verifier.stack.device
    if max_rows is None:
        max_rows = 24 if device.type == "cpu" else 1 + MAX_TREE_NODES
    verifier.set_row_sizes(())
    plain = [engine.plain(media, question) for _ in range(repeats)]
    prefill_ms = min(decoded.prefill_ms for decoded in plain)
    max_rows = min(max_rows, engine.strict_rows or max_rows)
    length = engine.length
    works = {str(rows): engine.timed_pass(rows, length) for rows in range(1, max_rows + 1)}
    times = interleaved(works, device, repeats, 1, settle=1)
    verify_ms = [min(found) for found in times.values()]
    verifier.set_row_sizes(row_sizes(verify_ms))
    # More rows never cost less: what says so is noise, or such a pass gets more rows.
    for row in range(max_rows - 1, 0, -1):
        verify_ms[row - 1] = min(verify_ms[row - 1 : row + 1])
    num_steps = len(plain[0].token_ids) - 1
    if engine.is_compiled and num_steps:
        # A call of its own is more than a cycle among many.
        step_ms = min(decoded.decode_ms for decoded in plain) / num_steps
        call_ms = max(0.0, verify_ms[0] - step_ms)
        verify_ms = [ms - call_ms for ms in verify_ms]
    costs = Costs(tuple(verify_ms), prefill_ms)
    if not engine.is_compiled:
        return costs
    return replace(costs, cycle_ms=_cycle_ms(engine, media, question, costs, repeats))


def _cycle_ms(engine: Engine, media: Media, question: str, costs: Costs, repeats: int) -> float:
    """What the loop itself takes a cycle where it is made in Python and plain steps are not."""
    found = []
    for _ in range(repeats):
        policy = Eager(Costs((costs.step,), costs.prefill_ms))
        decoded = engine.speculate(media, question, Rote(), 1, policy)
        if passes := len(decoded.cycle_drafted):
            found.append(decoded.decode_ms / passes - costs.verify(2))
    return max(0.0, min(found, default=0.0))


@torch.inference_mode()
def measure_drafting(
    engine: Engine,
    media: Media,
    question: str,
    speculator: Speculator,
    gamma: int,
    repeats: int = 15,
) -> tuple[float, float] | None:
    """Milliseconds of a draft's first level, and of each further one up to ``gamma``; None: it
    is timed as it is used, for it is neither compiled nor captured."""
    if not engine.is_compiled:
        return _unread_ms(engine, media, question, speculator, max(2, gamma))
    engine.speculate(media, question, speculator, 1)
    head = begun_head(speculator)
    if head is None:
        return None
    works = {str(gamma): head.timed_draft(gamma) for gamma in (1, 5)}
    times = interleaved(works, engine.verifier.stack.device, repeats, 1, settle=1)
    one, five = (min(found) for found in times.values())
    return one, max(0.0, five - one) / 4


def _unread_ms(
    engine: Engine, media: Media, question: str, speculator: Speculator, gamma: int
) -> tuple[float, float] | None:
    """``measure_drafting`` of drafts that nobody reads, as answers with drafts of 1 and ``gamma``
    levels take it."""
    found = []
    for depth in (1, gamma):
        answers = [engine.speculate(media, question, speculator, depth) for _ in range(4)]
        # An answer's first cycle may wait for what began in the gap, its last are less deep.
        times = [statistics.median(a.unread_ms) for a in answers if a.unread_ms]
        if not times:
            return None
        # Those that made captures took longer.
        found.append(min(times))
    one, all_ = found
    return one, max(0.0, all_ - one) / (gamma - 1)
