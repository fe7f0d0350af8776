"""A third pair is one module: it conforms, and every stage takes it by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands.conftest import runs, workplace, xsd  # noqa: F401
from tests.hidden import miniature
from tests.pairs import third_pair
from xsd.errors import XsdError
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.pairs.conformance import check_pair

NAME = "tests.pairs.third_pair"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def media() -> Media:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (30, 20 + k, 3), dtype=np.uint8) for k in range(5)]
    return Media(images, random.integers(0, 256, (8, 32, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", [NAME, "tiny", "miniature"])
def test_every_pair_conforms(name: str, media: Media) -> None:
    pair = miniature.pair() if name == "miniature" else load_pair(PairConfig(name, device="cpu"))
    check_pair(pair, media, "What is going on?")


def test_conformance_finds_what_is_broken(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair(PairConfig(NAME))
    honest = third_pair.Stack.forward

    def forgetful(self: Any, x: Any, cache: Any) -> Any:
        """Counts positions from the pass's own first row."""
        before, cache.pad = cache.length, None
        self.positions.weight.data = self.positions.weight.roll(before and 1, 0)
        return honest(self, x, cache)

    monkeypatch.setattr(third_pair.Stack, "forward", forgetful)
    with pytest.raises(AssertionError, match="in several passes: off by"):
        check_pair(pair, media, "What is going on?")


def test_names_that_are_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("no_such_module", r"unknown pair 'no_such_module'; choose one of tiny, lab, eventgpt"),
        ("tests.pairs.tokenizers", "has no PairSpec named PAIR"),
        ("not/a/name", "unknown pair 'not/a/name'"),
    ):
        with pytest.raises(XsdError, match=message):
            load_pair(PairConfig(name))


def test_the_page_shows_this_very_code() -> None:
    """Every Python block of docs/pairs.md is a stretch of the test double."""
    page = (ROOT / "docs/pairs.md").read_text()
    code = Path(str(third_pair.__file__)).read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        for stretch in filter(None, (part.strip("\n") for part in block.split("...\n"))):
            assert stretch in code, stretch


@pytest.mark.slow
def test_the_stages_take_it_by_name(
    workplace: Path,  # noqa: F811
    runs: Callable[..., list[Any]],  # noqa: F811
) -> None:
    data = miniature.save_scenes(workplace / "dataset")
    small = ["--num_heads", 2, "--ffn_dim", 16, "--unroll_steps", 2, "--num_epochs", 1]
    xsd("scenes", "--pair", NAME, "--source", "prepared", "--dataset_dir", data)
    xsd("lm_head", "--pair", NAME)
    xsd("extract", "--pair", NAME, "--max_new_tokens", 6, "--max_questions", 2)
    for level in ("L2", "E3"):
        xsd("train", "--pair", NAME, "--level", level, "--batch_size", 4, *small)
        xsd("promote", "--pair", NAME, "--level", level)
    xsd(
        "benchmark", "--pair", NAME, "--configs", "L2+VL,E3_decode", "--max_new_tokens", 6,
        "--max_samples", 2, "--repeats", 1, "--warmup", 0, "--overlap", "inline",
    )  # fmt: skip
    (run,) = runs("benchmark")
    assert run.data.tags["lossless"].lower() == "true" and run.data.tags["pair"] == NAME


def test_widths_and_architecture_are_its_own() -> None:
    pair: ModelPair = load_pair(PairConfig(NAME))
    assert (pair.drafter.width, pair.verifier.width) == (20, 28)
    assert isinstance(third_pair, ModuleType) and replace(PairConfig(NAME)).pair == NAME
    assert not torch.is_grad_enabled() or not pair.drafter.embedding.requires_grad
