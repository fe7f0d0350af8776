from __future__ import annotations

import torch

from tests.adapters.conftest import make_adapter, make_streams
from xsd.adapters.base import StepInputs
from xsd.adapters.live import bind


def test_twin_shares_weights_and_records_no_gradient() -> None:
    adapter, streams = make_adapter("E1").train(), make_streams()
    cache = adapter.new_cache(3, 9)
    rows = StepInputs(None, streams.verifier, streams.token)
    before = adapter.step(rows, cache)
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.5)
    cache.length = 0
    after = adapter.step(rows, cache)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, adapter.eval()(streams).detach(), rtol=1e-5, atol=1e-5)


def test_twin_leaves_the_module_as_it_was() -> None:
    adapter = make_adapter("E3").train()
    names = list(adapter.state_dict())
    bind(adapter)
    assert adapter.training and list(adapter.state_dict()) == names
    assert all(parameter.requires_grad for parameter in adapter.parameters())
