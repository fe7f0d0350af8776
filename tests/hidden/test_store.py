"""Reading a finished extraction: ours, and the published format's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.hidden.test_chunk import seed_chunk
from xsd.errors import XsdError
from xsd.hidden import store as store_module
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import extract, header
from xsd.hidden.index import CHECKSUM, INDEX, Half, signed
from xsd.hidden.plan import plan_batches
from xsd.hidden.store import HiddenStore, find_folder, folder_name
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import ModelPair
from xsd.types import Scene

CONFIG = ExtractConfig(max_new_tokens=8, max_questions=3, chunk_size=6, batch_clips=2)


def run(
    pair: ModelPair,
    scenes: list[Scene],
    folder: Path,
    config: ExtractConfig = CONFIG,
    half: Half = "train",
) -> Path:
    batches = plan_batches(scenes, half, config, config.batch_clips or 1)
    with HiddenWriter.open(folder, header(pair, batches, half, config, "data"), batches) as writer:
        missing = [batches[number] for number in writer.missing]
        for number, extracted in zip(writer.missing, extract(pair, missing, config), strict=True):
            writer.add(number, extracted)
    return folder


@pytest.fixture(scope="module")
def folder(pair: ModelPair, scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(pair, scenes, tmp_path_factory.mktemp("hidden") / folder_name("train", "fp32"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / folder.name))


def test_keys_splits_and_samples(folder: Path, scenes: list[Scene]) -> None:
    store = HiddenStore.open(folder)
    assert folder.name == "chunked_train_1s_fp32"
    expected = [f"{s.key}/q{q}" for s in scenes if s.split != "test" for q in range(3)]
    assert list(store.keys()) == expected and len(store) == 18
    assert set(store.keys("val")) == {k for k in expected if k.startswith("val_")}
    assert store.keys("train") + store.keys("val") == store.keys() and not store.keys("test")
    assert [len(keys) for keys in store.keys_by_chunk()] == [6, 6, 6]
    assert (store.d_drafter, store.d_verifier) == (24, 32)
    assert store.has_ids and store.has_visual and not store.approximate_split
    for key, sample in zip(expected, store, strict=True):
        assert sample.key == key
        assert torch.equal(sample.drafter_ids, sample.verifier_ids)
        assert sample.verifier_hidden.dtype == torch.bfloat16
        assert len(sample.drafter_hidden) == len(sample.verifier_ids) <= 8
    visual = store.visual(scenes[1].key)
    assert visual.projected.shape == visual.prefilled.shape == (40, 32)
    assert not torch.equal(visual.projected, visual.prefilled)


def test_index_keeps_the_published_keys(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    assert index["total_samples"] == 18 and index["chunk_size"] == 6
    first = index["chunks"][1]
    assert (first["path"], first["start_idx"], first["n_samples"]) == (
        "chunk_000006.safetensors",
        6,
        6,
    )
    assert first["samples"][0]["key"] == "train_0001/000000/q0"
    assert index["config"]["split"] == "train" and index["config"]["max_questions"] == 3
    assert index["conditioning"] == "teacher_forced" and index["complete"]


def test_digest_is_the_contents(folder: Path, copy: Path) -> None:
    assert HiddenStore.open(folder).digest == HiddenStore.open(copy).digest


def test_unknown_keys(folder: Path) -> None:
    store = HiddenStore.open(folder)
    with pytest.raises(XsdError, match="holds no sample 'x/0/q0'"):
        store.sample("x/0/q0")
    with pytest.raises(XsdError, match="no visual states of clip 'x/0'"):
        store.visual("x/0")


@pytest.mark.parametrize("name", ["chunks/chunk_000006", "visual/visual_000006"])
def test_an_altered_file_is_found_when_it_is_read(copy: Path, name: str) -> None:
    path = copy / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = HiddenStore.open(copy)
    store.sample(store.keys()[0])
    with pytest.raises(XsdError, match=r"_000006.safetensors: its sha256 is not the index's"):
        store.sample(store.keys()[6])
        store.visual("train_0001/000000")
    assert HiddenStore.open(copy, verify=False).sample(store.keys()[6])


def test_truncated_or_missing_chunks_are_found_at_once(copy: Path) -> None:
    path = copy / "chunks/chunk_000006.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(XsdError, match=r"bytes, the index says .* cut off or altered"):
        HiddenStore.open(copy)
    path.unlink()
    with pytest.raises(XsdError, match="missing, though the index names it"):
        HiddenStore.open(copy)


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(signed({**index, **changes})))


def test_bad_indices(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(XsdError, match=r"no index.json, so it holds no hidden states"):
        HiddenStore.open(tmp_path)
    edit_index(copy, complete=False)
    with pytest.raises(XsdError, match="was interrupted; run it again"):
        HiddenStore.open(copy)
    index = json.loads((copy / INDEX).read_text())
    chunks = [{**index["chunks"][0], "path": "../../../etc/passwd"}]
    edit_index(copy, complete=True, chunks=chunks)
    with pytest.raises(XsdError, match="leaves the folder"):
        HiddenStore.open(copy)
    edit_index(copy, chunks=[{"path": "x"}])
    with pytest.raises(XsdError, match="not an index of hidden states"):
        HiddenStore.open(copy)
    edit_index(copy, format="xsd.hidden/9")
    with pytest.raises(XsdError, match=r"'xsd.hidden/1' is read here"):
        HiddenStore.open(copy)
    (copy / INDEX).write_text("{")
    with pytest.raises(XsdError, match="cannot be read as JSON"):
        HiddenStore.open(copy)


def test_a_quiet_edit_of_an_index(copy: Path) -> None:
    """No field is wrong by itself: another key, which is as unique as the first."""
    text = (copy / INDEX).read_text()
    key = json.loads(text)["chunks"][0]["samples"][0]["key"]
    (copy / INDEX).write_text(text.replace(f'"{key}"', f'"{key}0"'))
    with pytest.raises(XsdError, match=r"index\.json: not as it was written"):
        HiddenStore.open(copy)
    content = json.loads(text)
    del content[CHECKSUM]
    (copy / INDEX).write_text(json.dumps(content))
    assert HiddenStore.open(copy).keys()[0] == key, "an index without a checksum is read too"


def test_find_folder(folder: Path, copy: Path, tmp_path: Path) -> None:
    assert find_folder(folder, "train") == folder
    assert find_folder(copy.parent, "train") == copy
    with pytest.raises(XsdError, match="no hidden states of the test split"):
        find_folder(copy.parent, "test")
    other = copy.with_name("chunked_train_1s_4bit")
    other.mkdir()
    (other / INDEX).write_text("{}")
    with pytest.raises(XsdError, match="holds chunked_train_1s_4bit, chunked_train_1s_fp32; name"):
        find_folder(copy.parent, "train")


def seed_folder(folder: Path, split: str = "train", width: int = 3, **config: object) -> Path:
    """Two chunks of another longest answer each, 40 answers, 10 questions a clip."""
    (folder / "chunks").mkdir(parents=True)
    chunks = []
    for start, longest in ((0, 4), (20, 6)):
        random = torch.Generator().manual_seed(start)
        content = seed_chunk(
            egpt_hidden=torch.randn(20, longest, width, generator=random),
            vl_hidden=torch.randn(20, longest, width, generator=random),
            seq_lens=torch.randint(1, longest + 1, (20,), generator=random),
            metadata={"longest": longest},
        )
        torch.save(content, folder / "chunks" / f"chunk_{start:06d}.pt")
        chunks.append({"path": f"chunk_{start:06d}.pt", "start_idx": start, "n_samples": 20})
    index = {
        "total_samples": 40,
        "chunk_size": 20,
        "chunks": chunks,
        "config": {
            "split": split,
            "duration": "1s",
            "quant": "4bit",
            "max_questions": 10,
            **config,
        },
        "metadata": {"made": "elsewhere"},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("config", [{}, {"hidden_dim": 3}])
def test_published_chunks(tmp_path: Path, config: dict[str, object]) -> None:
    store = HiddenStore.open(seed_folder(tmp_path / "x", **config))
    assert (store.d_drafter, store.d_verifier, len(store)) == (3, 3, 40)
    assert not store.has_ids and not store.has_visual and store.approximate_split
    assert store.header.conditioning == "free_running"
    scenes = {split: {k[:11] for k in store.keys(split)} for split in ("train", "val")}
    # Four clips: the last is held out, and the one before it separates the two.
    assert scenes == {"train": {"seed/000000", "seed/000001"}, "val": {"seed/000003"}}
    content = torch.load(tmp_path / "x/chunks/chunk_000020.pt", weights_only=True)
    sample = store.sample("seed/000002/q5")
    length = int(content["seq_lens"][5])
    assert torch.equal(sample.drafter_hidden, content["egpt_hidden"][5, :length])
    assert torch.equal(sample.verifier_hidden, content["vl_hidden"][5, :length])


def test_published_test_data_is_not_split(tmp_path: Path) -> None:
    store = HiddenStore.open(seed_folder(tmp_path / "x", split="test"))
    assert len(store.keys("test")) == 40 and not store.approximate_split


def test_a_single_published_file(tmp_path: Path) -> None:
    seed_folder(tmp_path / "x")
    store = HiddenStore.open(tmp_path / "x/chunks/chunk_000000.pt")
    assert len(store) == 20 and store.d_verifier == 3
    assert store.sample("seed/000001/q9").verifier_hidden.shape[1] == 3


def test_a_published_index_that_lies(tmp_path: Path) -> None:
    folder = seed_folder(tmp_path / "x", hidden_dim=3)
    index = json.loads((folder / INDEX).read_text())
    index["chunks"][1]["n_samples"] = 19
    (folder / INDEX).write_text(json.dumps(index))
    store = HiddenStore.open(folder)
    with pytest.raises(XsdError, match="holds 20 answers, its index 19"):
        store.sample(store.keys()[-1])


def test_published_chunks_are_not_all_kept_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_UNPACKED_BYTES", 1)
    store = HiddenStore.open(seed_folder(tmp_path / "x"))
    for key in (store.keys()[0], store.keys()[-1], store.keys()[0]):
        assert store.sample(key).key == key
        assert len(store._loaded) == 1


def test_written_in_the_published_format(
    pair: ModelPair, scenes: list[Scene], folder: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    config = replace(CONFIG, chunk_format="pt")
    store = HiddenStore.open(run(pair, scenes, tmp_path / "pt", config))
    ours = HiddenStore.open(folder)
    assert store.keys("val") == ours.keys("val") and not store.approximate_split
    assert not store.has_ids and not store.has_visual
    content = torch.load(tmp_path / "pt/chunks/chunk_000012.pt", weights_only=True)
    assert set(content) == {"egpt_hidden", "vl_hidden", "seq_lens"}
    for mine, theirs in zip(ours, store, strict=True):
        torch.testing.assert_close(
            mine.verifier_hidden.float(), theirs.verifier_hidden, rtol=1e-2, atol=1e-2
        )
