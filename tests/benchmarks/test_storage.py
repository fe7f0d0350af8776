"""The benchmark of stores runs; its numbers are nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import storage
from xsd.adapters import checkpoint
from xsd.adapters.catalog import build
from xsd.adapters.config import AdapterConfig
from xsd.files import read_json


@pytest.mark.slow
def test_three_precisions_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level in ("L4", "E1"):
        adapter = build(
            AdapterConfig(level=level, d_drafter=128, d_verifier=128, ffn_dim=16, num_heads=4)
        )
        checkpoint.save(adapter, tmp_path / level)
    names = ",".join(str(tmp_path / level) for level in ("L4", "E1"))
    words = ["--adapters", names, "--num_clips", "1", "--device", "cpu"]
    assert storage.main([*words, "--json", str(tmp_path / "a.json")]) == 0
    found = read_json(tmp_path / "a.json")
    assert found["num_answers"] == 10 and set(found["levels"]) == {"L4", "E1"}
    sizes = [found["stores"][dtype]["pair_bytes"] for dtype in ("fp32", "bf16", "fp8")]
    assert sizes == sorted(sizes, reverse=True)
    assert found["stores"]["bf16"]["over_fp32_with_index"] < 0.53
    for changed in found["changes"].values():
        assert {x["level"] for x in changed} == {"L4", "E1"}
    assert "bf16: the third digit of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exact", "rounded", "holds"),
    [
        (4.469, 4.472, True),  # third digit: a hundredth
        (4.469, 4.480, False),
        (0.520, 0.5208, True),  # a thousandth
        (0.520, 0.5185, False),
        (0.04, 0.0402, False),  # a ten-thousandth
        (0.0, 0.0, True),
        (0.0, 0.002, False),
        (0.5, float("nan"), False),
    ],
)
def test_the_third_digit(exact: float, rounded: float, holds: bool) -> None:
    assert storage.Change("L4", "x", exact, rounded).third_digit_holds is holds


def test_the_verdict_names_what_moves_and_the_largest_change() -> None:
    levels = {
        "A": {"fp32": {"x": 2.0, "y": 0.0}, "bf16": {"x": 2.001, "y": 0.0}},
        "B": {"fp32": {"x": 0.1, "y": 1.0}, "bf16": {"x": 0.08, "y": 1.0}},
    }
    found = storage.changes(levels, "bf16")
    assert storage.verdict(found, "bf16") == (
        "bf16: the third digit of 1 of 4 metrics does NOT hold (B x); "
        "the largest change is 20.000% (B x: 0.1, 0.08)"
    )
    kept = storage.changes({"A": levels["A"]}, "bf16")
    assert "the third digit of all 2 metrics holds" in storage.verdict(kept, "bf16")
