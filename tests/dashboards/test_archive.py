from __future__ import annotations

import pandas as pd
import pytest

from dashboards import archive
from dashboards.archive import Archive, Choice
from tests.dashboards.conftest import CLIP, PIECES
from xsd.errors import XsdError
from xsd.tracking.run import stage_run

Filled = dict[str, str]


def ids(frame: pd.DataFrame) -> set[str]:
    return set(frame["run_id"])


def test_a_choice_admits_what_it_says(filled: Filled) -> None:
    runs = Archive()
    everything = runs.chosen(Choice())
    assert ids(everything) >= set(filled.values())
    assert ids(runs.chosen(Choice(pair="other"))) == {filled["other"]}
    either = runs.chosen(Choice(tags=("level=L4", "level=E3", "stage=evaluate")))
    assert ids(either) == {filled["L4"], filled["E3"]}
    assert runs.chosen(Choice(tags=("level=none",))).empty
    day = str(everything["started"].max())[:10]
    assert len(runs.chosen(Choice(since=day, until=day))) == len(everything)
    assert runs.chosen(Choice(until="2001-01-01")).empty
    assert runs.chosen(Choice(since="2099-01-01")).empty


def test_it_looks_again_at_what_changed_alone(own: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Archive()
    with stage_run("train", "tiny", {}, tags={"level": "L2"}) as run:
        before = runs.runs().set_index("run_id")
        assert before.loc[run.run_id, "status"] == "RUNNING"
        monkeypatch.setattr(archive.query, "runs", lambda **_: pytest.fail("read everything"))
        assert not runs.refresh()
    assert runs.refresh()
    after = runs.runs().set_index("run_id")
    assert after.loc[run.run_id, "status"] == "FINISHED" and len(after) == len(before)
    with stage_run("train", "tiny", {}, tags={"level": "L3"}) as newer:
        pass
    assert runs.refresh() and runs.runs()["run_id"].iloc[0] == newer.run_id


def test_looking_at_all_finds_a_deleted_run(own: Filled) -> None:
    from xsd.tracking import store

    runs = Archive()
    runs.runs()
    store.client().delete_run(own["E3"])
    assert not runs.refresh() and ids(runs.runs()) == {own["E3"]}
    assert runs.refresh(whole=True) and runs.runs().empty


def test_an_empty_store(tracking: object) -> None:
    runs = Archive()
    assert runs.chosen(Choice(pair="tiny", tags=("a=b",))).empty
    assert not runs.refresh() and archive.tag_names(runs.runs()) == []


def test_tags_to_filter_by_say_what_a_run_is(filled: Filled) -> None:
    names = archive.tag_names(Archive().runs())
    assert {"level=L4", "stage=evaluate", "loss=token"} <= set(names)
    assert not any(name.startswith(("mlflow.", "xsd.", "input.", "pair=")) for name in names)


def test_of_a_variant_the_newest_finished(filled: Filled) -> None:
    found = archive.newest_of(Archive().runs(), "train")
    assert {name: row["run_id"] for name, row in found.items()} == {"L4": filled["train"]}


def test_a_sample_with_its_words_and_pictures(filled: Filled) -> None:
    rows = Archive().runs().to_dict("records")
    row = next(row for row in rows if row["run_id"] == filled["benchmark"])
    found = archive.example(row, "X1+E3", f"{CLIP}/q0")
    assert found is not None and found.plain.strategy == "vl_baseline"
    assert found.pieces == tuple(PIECES[str(token)] for token in found.fast.token_ids)
    assert (len(found.event_images), len(found.frames)) == (2, 8)
    assert all(image.startswith("data:image/png") for image in found.frames)
    assert archive.example(row, "E3_decode", f"{CLIP}/q1") is None


def test_pictures_of_a_folder(filled: Filled) -> None:
    from xsd.tracking import products

    kept = products.load("runs:/" + filled["scenes"]).path
    for folder in (kept, kept / "scenes"):
        assert [len(images) for images in archive.pictures(str(folder), f"{CLIP}/q0")] == [2, 8]


def test_pictures_out_of_reach_are_none(filled: Filled) -> None:
    assert archive.pictures("/nowhere", f"{CLIP}/q0") == ((), ())
    assert archive.pictures("runs:/" + filled["scenes"], "other/000009/q0") == ((), ())
    assert archive.pictures("", "x") == ((), ())


def test_configs_of_the_gap_lead(filled: Filled) -> None:
    found = archive.bench(filled["benchmark"])
    assert list(archive.drafting(found)) == ["X1+E3", "E3_decode", "drafter+VL"]
    assert [key for key, _ in archive.samples(found)] == [f"{CLIP}/q0", f"{CLIP}/q1"]


def test_a_benchmark_without_its_file(filled: Filled) -> None:
    with pytest.raises(XsdError, match="has no e2e"):
        archive.bench(filled["L4"])
    assert archive.positions(filled["benchmark"]) == []
    assert archive.importance(filled["benchmark"]).empty
