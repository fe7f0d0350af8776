"""The benchmark of extraction runs; its numbers are nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import extraction
from xsd.files import read_json
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import extract
from xsd.hidden.plan import plan_batches
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes
from xsd.scenes.dsec import load_index
from xsd.tracking import store

SMALL = ["--num_clips=2", "--rounds=1", "--published_clips=1", "--max_new_tokens=6", "--device=cpu"]


@pytest.mark.slow
@pytest.mark.usefixtures("tracking")
def test_both_sides_are_measured_written_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--max_questions=2", "--json", str(tmp_path / "a.json"), "--mlflow"]
    assert extraction.main(words) == 0
    found = read_json(tmp_path / "a.json")
    assert (sum(found["published"]["answers"]), sum(found["ours"]["answers"])) == (2, 4)
    assert found["ratio"] > 0 and found["published"]["peak"]["host"] > 0
    assert {"verifier generate", "drafter generate"} <= set(found["published"]["share"])
    assert {"verifier decode", "drafter forced pass", "chunks"} <= set(found["ours"]["share"])
    out = capsys.readouterr().out
    assert "bar: at least 6" in out and "(claim: at most 0.52)" in out
    [run] = store.client().search_runs(store.experiment_ids())
    assert run.data.metrics["measured.extraction.ratio"] == pytest.approx(found["ratio"])


@pytest.mark.slow
def test_the_published_loop_says_what_we_say(tmp_path: Path) -> None:
    """Faithful: the same answers, and free-running states of both models."""
    pair = load_pair(PairConfig(device="cpu"))
    for _ in make_scenes(ScenesConfig(output_dir=tmp_path, num_train=1, num_val=0, num_test=0)):
        pass
    config = ExtractConfig(conditioning="free_running", max_questions=2, max_new_tokens=12)
    batches = plan_batches(load_index(tmp_path), "train", config, 1)
    [ours] = extract(pair, batches, config)
    loop = extraction.PublishedLoop(pair, config.max_new_tokens)
    for sample, expected in zip(batches[0].samples, ours.samples, strict=True):
        found = loop.answer(sample)
        assert torch.equal(found.verifier_ids, expected.verifier_ids)
        assert torch.equal(found.drafter_ids, expected.drafter_ids)
        for side in ("drafter_hidden", "verifier_hidden"):
            torch.testing.assert_close(
                getattr(found, side), getattr(expected, side), rtol=1e-3, atol=1e-3
            )


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(extraction.XsdError, match="at least one a round"):
        extraction.main(["--num_clips", "1", "--rounds", "2", "--device", "cpu"])
