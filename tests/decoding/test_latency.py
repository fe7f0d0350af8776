"""The cost of a drafted token is that of the step that live decoding takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.adapters.conftest import make_adapter
from xsd.adapters.catalog import LEVELS
from xsd.decoding import latency

NUM_IDS = 40


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_is_stepped_as_it_drafts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a repeat into a cache of one prefix row, and its choice among all words."""
    adapter = make_adapter(name).eval()
    width = adapter.config.d_verifier
    rows: list[int] = []
    lengths: list[int] = []
    chosen: list[torch.Size] = []
    original = type(adapter).step

    def step(self: Any, inputs: Any, cache: Any) -> Any:
        lengths.append(cache.length)
        states = original(self, inputs, cache)
        rows.append(states.shape[1])
        return states

    class Chooser:
        def __init__(self, head: torch.nn.Linear) -> None:
            assert head.weight.shape == (NUM_IDS, width)

        def __call__(self, states: torch.Tensor) -> None:
            chosen.append(states.shape)

    def interleaved(
        works: Mapping[str, Callable[[], None]], device: Any, repeats: int, warmup: int
    ) -> dict[str, list[float]]:
        for _ in range(repeats):
            works["token"]()
        return {"token": [3.0, 1.0, 2.0]}

    monkeypatch.setattr(type(adapter), "step", step)
    monkeypatch.setattr(latency, "Chooser", Chooser)
    monkeypatch.setattr(latency, "interleaved", interleaved)
    assert latency.token_ms(adapter, torch.zeros(NUM_IDS, width), repeats=2) == 2.0
    assert rows[-2:] == [1, 1] and lengths[-2:] == [1, 1] and len(rows) == 3
    assert chosen == [torch.Size([1, 1, width])] * 2


def test_it_is_a_time() -> None:
    adapter = make_adapter("L4").eval()
    head = torch.zeros(NUM_IDS, adapter.config.d_verifier)
    assert 0 < latency.token_ms(adapter, head, repeats=3) < 10_000
