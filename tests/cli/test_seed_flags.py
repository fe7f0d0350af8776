"""The table of the published flags, held against the configurations of the stages."""

from __future__ import annotations

import importlib

import pytest

from xsd.cli import COMMANDS
from xsd.cli.seed_flags import SEED_FLAGS, SeedFlag, epilog, translate
from xsd.config import parse, resolved
from xsd.errors import XsdError


def defaults(stage: str) -> dict[str, object]:
    config_class = importlib.import_module(COMMANDS[stage]).Config
    return resolved(parse(config_class, [], prog=f"xsd {stage}"))


@pytest.mark.parametrize("row", SEED_FLAGS, ids=lambda row: f"{row.stage}-{row.name}")
def test_a_published_flag_has_a_field_and_its_default(row: SeedFlag) -> None:
    if row.ours is None:
        assert row.why
        return
    ours = defaults(row.stage)
    assert row.ours in ours
    if not row.why:
        expected = "null" if row.default is None else row.default
        assert ours[row.ours] == expected


def test_every_published_script_is_covered() -> None:
    stages = {"lm_head", "extract", "train", "evaluate", "two_phase", "benchmark"}
    assert {row.stage for row in SEED_FLAGS} == stages


@pytest.mark.parametrize(
    ("stage", "given", "ours"),
    [
        ("train", "--train_data a --val_data b", "--data a --val_data b"),
        ("train", "--adapter-level=4", "--level 4"),
        ("train", "--adapter_level 5 --vlm_only", "--level 5 --level B1"),
        ("train", "--vlm_only false --num_epochs 3", "--num_epochs 3"),
        ("evaluate", "--vlm_only --test_data x", "--data x --level B1"),
        ("evaluate", "--egpt_prefill_ms 1 --vl_prefill_ms 2", None),
        ("extract", "--max_samples -1 --split test", "--max_samples -1 --split test"),
        ("benchmark", "--configs vl_baseline,L4+VL", "--configs vl_baseline,L4+VL"),
        ("train", "--strict -h word", "--strict -h word"),
    ],
)
def test_translation(stage: str, given: str, ours: str | None) -> None:
    if ours is None:
        ours = "--drafter_prefill_ms 1 --verifier_prefill_ms 2"
    assert translate(stage, given.split()) == (ours.split(), [])


def test_what_is_always_on_is_said_once() -> None:
    words, notes = translate(
        "extract", ["--chunked", "--resume", "--save_interval", "9", "--chunked"]
    )
    assert words == []
    assert len(notes) == 3
    assert translate("report", ["--chunked"])[1] == notes[:1]


def test_vlm_only_needs_level_5() -> None:
    with pytest.raises(XsdError, match="belongs to level 5, not L4"):
        translate("train", ["--adapter_level", "4", "--vlm_only"])


def test_help_names_the_published_flags() -> None:
    assert "--adapter_level = --level" in epilog("train")
    assert epilog("report") == ""
