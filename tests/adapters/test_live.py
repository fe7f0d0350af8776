from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.adapters.conftest import make_adapter, make_streams
from tests.adapters.test_levels import every_level, live_rows
from xsd.adapters.catalog import Level
from xsd.adapters.compiled import CompiledCache
from xsd.adapters.live import bind
from xsd.adapters.rows import StepInputs

FLOATING = ("drafter", "verifier", "token", "visual")


def test_twin_follows_the_weights_and_records_no_gradient() -> None:
    adapter, streams = make_adapter("E1").train(), make_streams()
    rows = live_rows(adapter, streams, 0, 5)
    before = adapter.step(rows, adapter.new_cache(3, 9))
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.5)
    rows = live_rows(adapter, streams, 0, 5)
    after = adapter.step(rows, adapter.new_cache(3, 9))
    assert not torch.allclose(after, before)
    expected, real = adapter.eval()(streams).detach()[:, :6], streams.mask[:, :6]
    torch.testing.assert_close(after[real], expected[real], rtol=1e-5, atol=1e-5)


def test_twin_is_made_once_for_the_same_weights() -> None:
    adapter = make_adapter("E1")
    first, second = adapter.new_cache(1, 4), adapter.new_cache(3, 9)
    assert isinstance(first, CompiledCache) and isinstance(second, CompiledCache)
    assert first.head is second.head


def test_twin_leaves_the_module_as_it_was() -> None:
    adapter = make_adapter("E3").train()
    names = list(adapter.state_dict())
    adapter.new_cache(3, 9, visual=make_streams().visual)
    bind(adapter)
    assert adapter.training and list(adapter.state_dict()) == names
    assert all(parameter.requires_grad for parameter in adapter.parameters())


@every_level
def test_compiled_steps_equal_those_of_the_modules(row: Level) -> None:
    """In double precision nothing is compiled: the module's own operations run."""
    streams, adapter = make_streams(batch=1), make_adapter(row.name)
    exact = make_adapter(row.name)
    exact.load_state_dict(adapter.state_dict())
    exact.double()
    outs = []
    for made, dtype in ((adapter, torch.float32), (exact, torch.float64)):
        given = replace(streams, **{n: getattr(streams, n).to(dtype) for n in FLOATING})
        cache = made.new_cache(1, 9, visual=given.visual)
        compiles = dtype == torch.float32 and row.name not in ("L1", "L2", "L3")
        assert isinstance(cache, CompiledCache) is compiles
        parts = [made.step(live_rows(made, given, *at), cache) for at in ((0, 3), (4, 4), (5, 6))]
        outs.append(torch.cat(parts, dim=1).double())
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", ["B1", "E1", "E3", "text"])
def test_a_compiled_row_is_the_same_whatever_goes_with_it(level: str) -> None:
    streams, adapter = make_streams(batch=1), make_adapter(level)
    outs = []
    whole = live_rows(adapter, streams, 0, 6)
    for ends in ([7], [1, 6, 7], [1, 2, 3, 4, 5, 6, 7]):
        cache = adapter.new_cache(1, 9, visual=streams.visual)
        parts = []
        for start, stop in pairwise([0, *ends]):
            states = None if whole.verifier is None else whole.verifier[:, start:stop]
            token = None if whole.token is None else whole.token[:, start:stop]
            rows = StepInputs(None, states, token)
            parts.append(adapter.step(rows, cache))
        outs.append(torch.cat(parts, dim=1))
    assert torch.equal(outs[1], outs[2])
    assert torch.equal(outs[0], outs[2])
