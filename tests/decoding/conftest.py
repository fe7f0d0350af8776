"""The shipped pair, a few scenes in memory, and adapters of every level with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from xsd.adapters import checkpoint
from xsd.adapters.catalog import LEVELS, build
from xsd.adapters.config import AdapterConfig
from xsd.bench import BenchItem
from xsd.decoding import coupled_graphs, graphs, tree_graphs
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.synthetic import sample_facts, scene_tensors
from xsd.types import Sample, Scene


@pytest.fixture(scope="session")
def pair() -> ModelPair:
    return load_pair(PairConfig(device="cpu"))


@pytest.fixture
def whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled drafts with weights as they are, in single precision: what the modules' own are held
    to. That halving rounds them, and does nothing else, has tests of its own."""
    monkeypatch.setattr("xsd.kernels.halve", lambda panels: panels)


@pytest.fixture(scope="session")
def items() -> list[BenchItem]:
    media = []
    for seed in range(3):
        frames, events = scene_tensors(sample_facts(np.random.default_rng(seed)), seed)
        media.append(Media(events, frames))
    return [
        BenchItem(
            Sample(
                Scene("r", i, "test", None, (), None, Path("none.mp4")), 3 * i, QUESTIONS[3 * i]
            ),
            media[i],
            0.0,
            Media(media[i - 1].event_images, media[i].frames),
        )
        for i in range(3)
    ]


@pytest.fixture(scope="session")
def adapters(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights, so that drafts are wrong in all kinds of ways."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = {}
    torch.manual_seed(0)
    for name in [*LEVELS, "L4:free"]:
        config = AdapterConfig(
            level=name.partition(":")[0],
            d_drafter=pair.drafter.width,
            d_verifier=pair.verifier.width,
            ffn_dim=64,
        )
        adapter = build(config)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        paths[name] = folder / name.replace(":", "_")
        checkpoint.save(adapter, paths[name])
    return paths


class Replayed:
    """A capture where there is no GPU: the work is run again, into the tensors of the first run."""

    made = 0

    def __init__(self, work: Callable[[], Any], lane: object) -> None:
        Replayed.made += 1
        self._work, self.result = work, work()

    def replay(self) -> Any:
        found = tree_leaves(self._work())
        for kept, new in zip(tree_leaves(self.result), found, strict=True):
            kept.copy_(new)
        return self.result


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where what is captured lies; on a CPU it is run again instead."""
    if request.param == "cpu":
        Replayed.made = 0
        for module in (graphs, tree_graphs, coupled_graphs):
            monkeypatch.setattr(module, "Capture", Replayed)
        for module in (graphs, coupled_graphs):
            monkeypatch.setattr(module, "Lane", lambda device: None)
    return torch.device(request.param)


def on(device: torch.device, pair: ModelPair) -> ModelPair:
    return pair if device.type == "cpu" else load_pair(PairConfig(device="cuda"))
