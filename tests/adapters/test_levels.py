"""What every row of the catalog must keep; a new row inherits all of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.adapters.conftest import D_VERIFIER, SIZES, make_adapter, make_streams
from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import LEVELS, Level
from xsd.adapters.config import AdapterSizes
from xsd.adapters.rows import StepInputs
from xsd.errors import XsdError

every_level = pytest.mark.parametrize("row", LEVELS.values(), ids=list(LEVELS))


def perturbed(streams: Streams, position: int, *names: str) -> Streams:
    """The named streams changed at ``position`` and beyond."""
    changed = {}
    for name in names:
        x = getattr(streams, name).clone()
        x[:, position:] += 1.0
        changed[name] = x
    return replace(streams, **changed)


def live_rows(adapter: Adapter, streams: Streams, first: int, last: int) -> StepInputs:
    """Rows first..last of ``streams``, as the engine would hand them to ``step``."""
    reads = adapter.row.streams
    start, stop = first, last + 1
    if adapter.memory == "drafter":
        start, stop = (first + 1 if first else 0), last + 2
    read = adapter.read_tokens(streams.token[:, first : last + 1])
    return StepInputs(
        drafter=streams.drafter[:, start:stop] if "drafter" in reads else None,
        verifier=streams.verifier[:, first : last + 1] if "verifier" in reads else None,
        token=read.detach() if "token" in reads else None,
    )


@every_level
@pytest.mark.parametrize("equal", [True, False])
def test_output_has_the_verifiers_width(row: Level, equal: bool) -> None:
    adapter = make_adapter(row.name, equal=equal)
    streams = make_streams(d_drafter=D_VERIFIER) if equal else make_streams()
    assert adapter(streams).shape == streams.verifier.shape
    assert len(adapter.unroll(streams, 3)) == 3


@every_level
def test_is_causal(row: Level, streams: Streams) -> None:
    adapter = make_adapter(row.name)
    before = adapter(streams)
    # E2 may use the drafter's state one position ahead: it has read the token just chosen.
    ahead = 1 if adapter.memory == "drafter" else 0
    for t in range(streams.ids.shape[1] - 1 - ahead):
        changed = perturbed(streams, t + 1, "verifier", "token")
        changed = perturbed(changed, t + 1 + ahead, "drafter")
        torch.testing.assert_close(adapter(changed)[:, : t + 1], before[:, : t + 1])


@every_level
def test_cannot_see_its_target(row: Level, streams: Streams) -> None:
    """Element k of the chain from t must not move when v or y change at t + shift + k."""
    adapter = make_adapter(row.name)
    before = adapter.unroll(streams, 3)
    for k in range(3):
        for t in range(streams.ids.shape[1] - row.shift - k):
            changed = perturbed(streams, t + row.shift + k, "verifier", "token")
            after = adapter.unroll(changed, 3)[k]
            torch.testing.assert_close(after[:, t], before[k][:, t])


@every_level
def test_chain_uses_its_own_states_after_the_anchor(row: Level, streams: Streams) -> None:
    """Drafting k ahead of t may know tokens, but no verifier state after t."""
    adapter = make_adapter(row.name)
    before = adapter.unroll(streams, 4)
    for t in range(4):
        after = adapter.unroll(perturbed(streams, t + 1, "verifier"), 4)
        for k in range(4):
            torch.testing.assert_close(after[k][:, t], before[k][:, t])


@every_level
def test_every_input_matters(row: Level, streams: Streams) -> None:
    adapter = make_adapter(row.name)
    before = adapter(streams)
    for name in ("drafter", "verifier", "token", "visual"):
        read = name in row.streams or (name == "visual" and row.visual is not None)
        changed = perturbed(streams, 0, name)
        assert torch.equal(adapter(changed), before) is not read, name


@every_level
def test_parallel_unrolled_and_live_agree(row: Level, streams: Streams) -> None:
    """A drafted chain from every anchor, rolled back, then the true rows: one cache throughout."""
    adapter = make_adapter(row.name)
    length, num_steps = streams.ids.shape[1], 3
    chains = adapter.unroll(streams, num_steps)
    torch.testing.assert_close(chains[0], adapter(streams), rtol=1e-5, atol=1e-5)
    cache = adapter.new_cache(streams.ids.shape[0], length, visual=streams.visual)

    def check(out: Tensor, k: int, anchor: int) -> None:
        real = streams.mask[:, anchor + row.shift + k]
        torch.testing.assert_close(out[real, -1], chains[k][real, anchor], rtol=1e-5, atol=1e-5)

    for anchor in range(length - num_steps - 1):
        out = adapter.step(live_rows(adapter, streams, anchor, anchor), cache)
        check(out, 0, anchor)
        for k in range(1, num_steps):
            rows = live_rows(adapter, streams, anchor + k, anchor + k)
            if row.feedback:
                rows = replace(rows, verifier=out)
            out = adapter.step(rows, cache)
            check(out, k, anchor)
        assert cache.length == anchor + num_steps
        cache.length = anchor + 1


@every_level
@pytest.mark.parametrize("splits", [(0, 9), (0, 3, 9), (0, 1, 5, 9)])
def test_steps_of_many_rows_agree(row: Level, splits: tuple[int, ...]) -> None:
    streams = make_streams(length=10)
    adapter = make_adapter(row.name)
    cache = adapter.new_cache(streams.ids.shape[0], 10, visual=streams.visual)
    parts: list[Tensor] = []
    for first, stop in pairwise(splits):
        parts.append(adapter.step(live_rows(adapter, streams, first, stop - 1), cache))
    # A row whose answer ends has no drafter state ahead of it.
    real = streams.mask[:, 1:]
    torch.testing.assert_close(
        torch.cat(parts, dim=1)[real], adapter(streams)[:, :9][real], rtol=1e-5, atol=1e-5
    )


@every_level
def test_padding_changes_nothing(row: Level) -> None:
    adapter, long = make_adapter(row.name), make_streams(batch=1, length=9)
    short = replace(
        long,
        **{n: getattr(long, n)[:, :6] for n in ("drafter", "verifier", "token", "ids", "mask")},
    )
    # The last row of the short batch has no drafter state ahead of it: it has no target either.
    torch.testing.assert_close(adapter(short)[:, :5], adapter(long)[:, :5])


@every_level
def test_every_parameter_gets_a_gradient(row: Level, streams: Streams) -> None:
    adapter = make_adapter(row.name).train()
    sum(out.square().mean() for out in adapter.unroll(streams, 2)).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_level
def test_missing_stream_is_named(row: Level, streams: Streams) -> None:
    bare = replace(streams, drafter=None, token=None, visual=None)
    adapter = make_adapter(row.name)
    if row.streams == ("verifier",):
        adapter(bare)
    else:
        with pytest.raises(XsdError, match=f"level {row.name} reads the"):
            adapter(bare)


@every_level
def test_too_long_an_answer_is_refused(row: Level) -> None:
    with pytest.raises(XsdError, match="max_positions"):
        make_adapter(row.name)(make_streams(length=25))
    with pytest.raises(XsdError, match="max_positions"):
        make_adapter(row.name).new_cache(1, 25, visual=torch.zeros(1, 5, D_VERIFIER))


def test_visual_levels_need_visual_states_to_draft() -> None:
    with pytest.raises(XsdError, match="prefilled"):
        make_adapter("E3").new_cache(1, 8)


def test_bidirectional_l4_sees_the_future_and_cannot_be_deployed(streams: Streams) -> None:
    sizes = replace(SIZES, attention="bidirectional")
    adapter = make_adapter("L4", sizes=sizes)
    changed = adapter(perturbed(streams, 4, "drafter"))
    assert not torch.allclose(changed[2, :3], adapter(streams)[2, :3])
    assert not adapter.deployable and make_adapter("L4").deployable
    with pytest.raises(XsdError, match="bidirectional"):
        adapter.new_cache(1, 8)
    with pytest.raises(XsdError, match="only L4"):
        make_adapter("L5", sizes=sizes)


def test_bidirectional_l4_ignores_padding() -> None:
    adapter = make_adapter("L4", sizes=replace(SIZES, attention="bidirectional"))
    streams = make_streams(batch=2)
    changed = streams.drafter.clone()
    changed[~streams.mask] += 1.0
    after = adapter(replace(streams, drafter=changed))
    torch.testing.assert_close(after[streams.mask], adapter(streams)[streams.mask])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(XsdError, match="num_heads=5"):
        make_adapter("L4", sizes=AdapterSizes(num_heads=5))
