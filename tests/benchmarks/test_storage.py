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
    for change in found["changes"].values():
        assert change["absolute"] >= 0 and change["absolute_of"].split()[0] in ("L4", "E1")
    assert "bars for bf16" in capsys.readouterr().out


def test_the_largest_change_is_found() -> None:
    levels = {
        "A": {"fp32": {"x": 2.0, "y": 0.0}, "bf16": {"x": 2.1, "y": 0.0}},
        "B": {"fp32": {"x": 0.1, "y": 1.0}, "bf16": {"x": 0.08, "y": 1.0}},
    }
    found = storage.changes(levels, "bf16")
    assert found["absolute"] == pytest.approx(0.1) and found["absolute_of"] == "A x"
    assert found["relative"] == pytest.approx(0.2) and found["relative_of"] == "B x"
