"""The benchmark of the engine runs; its numbers are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import engine, formula
from xsd.clock import Stopwatch
from xsd.decoding.decoded import Decoded
from xsd.files import read_json
from xsd.types import Span, Strategy

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


@pytest.mark.parametrize("only", ["contenton", "passes,contenton", ""])
def test_a_measurement_that_is_none_is_told_in_one_line(only: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", "--only", only],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "is none of passes,breakdown,overhead,peer,contention,formula" in line


class Drafter:
    """Takes 2 ms by itself and 3 beside the verifier."""

    def __init__(self) -> None:
        self.took_ms = 2.0

    def start(self, media: object, question: str, watch: Stopwatch) -> None: ...
    def finish(self) -> list[Span]:
        return [Span("drafter", "prefill", 1.0, 1.0 + self.took_ms)]


def bare_bench(**parts: Any) -> engine.Bench:
    bench = object.__new__(engine.Bench)
    bench.__dict__.update(device=torch.device("cpu"), **parts)
    return bench


def test_contention_is_of_one_party_alone_and_beside_the_verifier() -> None:
    drafter, nobody = Drafter(), object()

    def speculate(media: object, question: str, party: object, gamma: int) -> Decoded:
        if party is nobody:
            return Decoded(prefill_ms=10.0)
        assert party is drafter
        spans = [Span("drafter", "prefill", 0.0, 3.0), Span("verifier", "prefill", 0.0, 14.0)]
        return Decoded(prefill_ms=14.0, timeline=spans)

    bench = bare_bench(
        options=SimpleNamespace(repeats=3),
        asked=[(None, "?")],
        engine=SimpleNamespace(speculate=speculate),
        party=lambda strategy, head: nobody,
        beside=lambda strategy: nullcontext(drafter),
    )
    assert bench.contention() == {"verifier": 1.4, "drafter": 1.5}


def test_the_drafters_stream_is_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "StreamSpeculator", lambda local, device: device)
    there = torch.device("cuda:1")
    bench = bare_bench(
        drafter=SimpleNamespace(stack=SimpleNamespace(device=there)),
        party=lambda strategy, head: None,
    )
    bench.device = torch.device("cuda:0")
    with bench.beside(Strategy("drafter+VL", gap="drafter", gap_mode="free")) as device:
        assert device == there  # type: ignore[comparison-overlap]


def test_it_needs_no_tracking_and_no_media_libraries() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('mlflow', 'optuna', 'av', 'plotly')))"
    subprocess.run(
        [sys.executable, "-c", f"{blocked}; from benchmarks import engine"], cwd=ROOT, check=True
    )
