"""A miniature pair on disk, and data extracted with it, for the stages to work on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hidden import miniature
from xsd.cli import main
from xsd.config import resolved
from xsd.hidden import lm_head
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import extract, header
from xsd.hidden.index import Half
from xsd.hidden.plan import plan_batches
from xsd.hidden.store import folder_name
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.scenes.dsec import load_index
from xsd.tracking import figures


@dataclass(frozen=True)
class World:
    """Paths of what the stages take."""

    pair: PairConfig
    scenes: Path
    data: Path
    """Holds chunked_train_1s_fp32 and chunked_test_1s_fp32."""
    head: Path

    @property
    def pair_flags(self) -> list[str]:
        values = resolved(self.pair) | {"device": "cpu"}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    @property
    def train_flags(self) -> list[str]:
        flags = {
            "data": self.data,
            "lm_head": self.head,
            "num_epochs": 2,
            "batch_size": 4,
            "num_heads": 4,
            "ffn_dim": 16,
            "bottleneck_dim": 8,
            "max_positions": 64,
            "unroll_steps": 2,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [*self.pair_flags, *words]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root: Path) -> World:
    """A pair, scenes, both halves of an extraction and the head, below ``root``."""
    config = miniature.save_pair(root / "pair")
    scenes = load_index(miniature.save_scenes(root / "scenes"))
    settings = ExtractConfig(max_new_tokens=8, max_questions=3, batch_clips=2)
    pair = load_pair(config)
    halves: tuple[Half, ...] = ("train", "test")
    for half in halves:
        batches = plan_batches(scenes, half, settings, 2)
        top = header(pair, batches, half, settings, "data")
        with HiddenWriter.open(root / "data" / folder_name(half, "fp32"), top, batches) as writer:
            for number, extracted in enumerate(extract(pair, batches, settings)):
                writer.add(number, extracted)
    verifier = Path(str(config.verifier))
    head = root / "head/lm_head.safetensors"
    lm_head.save(lm_head.read_tensors(verifier), head, pair.provenance["verifier"])
    return World(config, root / "scenes", root / "data", head.parent)


@pytest.fixture
def workplace(tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with a store of its own; no browser is started for PNGs."""
    monkeypatch.setattr(figures, "_browser_found", lambda: False)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def runs(workplace: Path) -> Callable[..., list[Any]]:
    """Finished runs of a stage, the newest first, as MLflow's own records."""
    from xsd.tracking import store

    def find(stage: str) -> list[Any]:
        condition = f"tags.stage = '{stage}' AND attributes.status = 'FINISHED'"
        return list(store.client().search_runs(store.experiment_ids(), condition))

    return find


def xsd(*words: object, expect: int = 0) -> None:
    assert main([str(word) for word in words]) == expect


def tags(run: Any) -> Mapping[str, str]:
    return dict(run.data.tags)


def drawn(page: Path) -> list[str]:
    """Names of the figures in a page of them."""
    return re.findall(r'<section id="(\w+)">', page.read_text(encoding="utf-8"))
