"""The shipped pair, a few scenes in memory, and adapters of every level with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from xsd.adapters import checkpoint
from xsd.adapters.catalog import LEVELS, build
from xsd.adapters.config import AdapterConfig
from xsd.bench import BenchItem
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.synthetic import sample_facts, scene_tensors
from xsd.types import Sample, Scene


@pytest.fixture(scope="session")
def pair() -> ModelPair:
    return load_pair(PairConfig(device="cpu"))


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
