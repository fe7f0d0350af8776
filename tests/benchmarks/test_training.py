"""The benchmarks of training and evaluation run, and compare equals; their times are not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import evaluation, training
from xsd.adapters.base import Streams
from xsd.files import read_json

SMALL = ["--vocab_size=40", "--num_samples=70"]


def test_the_seeds_loop_trains_the_same_function(tmp_path: Path) -> None:
    options = training.parse([*SMALL, "--num_val=10", "--dropout=0"])
    bench = training.Bench(tmp_path, 32, options)
    block = training.SeedBlock(bench.adapter(0)).eval()
    drafter, verifier, mask = next(bench._seeds_batches(torch.Generator().manual_seed(0)))
    ids = torch.zeros_like(mask, dtype=torch.long)
    streams = Streams(drafter, verifier, None, None, ids, mask)
    expected = bench.adapter(0).eval()(streams)[mask]
    torch.testing.assert_close(block(drafter, mask)[mask], expected, rtol=1e-4, atol=1e-4)


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--widths=32", "--num_val=10", "--num_epochs=1", "--loss=token"]
    assert training.main([*SMALL, *words, f"--json={tmp_path / 'a.json'}"]) == 0
    found = read_json(tmp_path / "a.json")["32"]
    assert list(found) == ["seed's loop", "xsd fp32", "xsd bf16"]
    for values in found.values():
        assert sum(values["share"].values()) == pytest.approx(1)
        assert len(values["val"]["cos_sim_mean"]) == 2 and values["samples_per_second"] > 0
    assert "L4 at d = 32" in capsys.readouterr().out


def test_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--width=32", f"--json={tmp_path / 'a.json'}"]
    assert evaluation.main(words) == 0
    assert read_json(tmp_path / "a.json")["answers_per_second"] > 0
    assert "70 answers of 36 positions" in capsys.readouterr().out
