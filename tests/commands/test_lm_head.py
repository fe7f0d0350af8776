from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import World, xsd
from xsd.hidden import lm_head
from xsd.tracking import products


def test_leaves_a_head_that_loads_and_is_reused(
    world: World, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    xsd("lm_head", *world.pair_flags)
    xsd("lm_head", *world.pair_flags)
    assert "reused run" in capsys.readouterr().out
    [run] = runs("lm_head")
    product = products.load(f"runs:/{run.info.run_id}")
    assert lm_head.load(product.path).digest == lm_head.load(world.head).digest
    assert run.data.metrics["width"] == 32
    [written] = Path("outputs/lm_head").rglob("lm_head.safetensors")
    assert lm_head.load(written).lm_head.shape[1] == 32


def test_a_published_path_keeps_its_name(world: World, workplace: Path) -> None:
    xsd("lm_head", *world.pair_flags, "--output_path", workplace / "vl_lm_head.pt")
    assert lm_head.load(workplace / "vl_lm_head.safetensors").embed_tokens.shape[1] == 32


def test_missing_checkpoints(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pair", "eventgpt-video-llava"]
    xsd("lm_head", *words, expect=2)
    assert "needs --drafter, a folder or the hub id" in capsys.readouterr().err
    xsd("lm_head", *words, "--drafter", workplace, "--verifier", "nowhere", expect=2)
    assert "--verifier nowhere: no such folder" in capsys.readouterr().err
    xsd("lm_head", "--pair", "huge", expect=2)
    assert "unknown pair 'huge'; choose one of tiny, lab, eventgpt-video-llava" in (
        capsys.readouterr().err
    )
