"""The benchmark of the engine runs; its numbers are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engine, formula
from xsd.files import read_json

ROOT = Path(__file__).parents[2]
SIZES = {"num_samples": 1, "repeats": 1, "formula_repeats": 1, "max_new_tokens": 8}
SMALL = [*(f"--{name}={value}" for name, value in SIZES.items()), "--device", "cpu"]


@pytest.mark.slow
def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ROWS", range(1, 4))
    monkeypatch.setattr(formula, "ALPHAS", (0.5,))
    monkeypatch.setattr(formula, "GAMMAS", range(1, 3))
    only = "passes,breakdown,overhead,peer,contention,formula"
    assert engine.main([*SMALL, "--noise", "--only", only, "--json", str(tmp_path / "a.json")]) == 0
    found = read_json(tmp_path / "a.json")
    assert {"V(1)", "V(3)", "head chain of 4", "drafter prefill"} <= set(found["passes_ms"])
    assert found["floor"]["floor_ms"] > 0 and found["overhead"]["num_operators"] < 10
    assert found["peer"]["same"]["generate"] == 1 and found["peer_ratios"]["generate"] > 0
    assert [row["gamma"] for row in found["formula"]["points"]] == [1, 2]
    told = found["breakdown"]
    assert sum(row["ms"] for row in told["rows"]) == pytest.approx(told["total_ms"])
    floors = {row["part"] for row in told["rows"] if row["floor_ms"] > 0}
    assert {"vision tower", "projector", "language prefill", "verifier passes", "LM head"} == floors
    out = capsys.readouterr().out
    assert "Floor of a step" in out and "differences" in out
    assert "generate, assisted by the drafter" in out


def test_it_needs_no_tracking_and_no_media_libraries() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('mlflow', 'optuna', 'av', 'plotly')))"
    subprocess.run(
        [sys.executable, "-c", f"{blocked}; from benchmarks import engine"], cwd=ROOT, check=True
    )
