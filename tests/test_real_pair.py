"""The real pair end to end: checkpoints as they are published, a prepared data set, nothing else.

Sizes are toys and weights random; formats, names, shards, tokenizer files and flags are the real
ones. Every stage finds what it needs from the paths alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from tests.commands.conftest import runs, workplace, xsd  # noqa: F401
from tests.hidden import miniature
from tests.pairs import published
from xsd.commands.adapter_data import open_head, open_store
from xsd.errors import XsdError
from xsd.files import read_json
from xsd.hidden import lm_head
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.pairs.eventgpt import SYSTEM, EventGPTDecoder

PAIR = "eventgpt-video-llava"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return published.write_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def config(folders: tuple[Path, Path]) -> PairConfig:
    drafter, verifier = map(str, folders)
    return PairConfig(PAIR, drafter, verifier, quant="fp32", device="cpu")


def test_prompts_are_the_sentencepiece_models_own_ids(config: PairConfig) -> None:
    """One BOS, the placeholder's place, nothing added: as LLaVA's tools and HF's processor do."""
    pair = load_pair(config)
    drafter, verifier = pair.drafter, pair.verifier
    model = sentencepiece.SentencePieceProcessor(str(Path(str(config.drafter)) / "tokenizer.model"))
    question = "What vehicles are present and how are they positioned?"
    prompt = drafter.prompt(question)
    assert isinstance(drafter, EventGPTDecoder)
    assert list(prompt.before) == [1, *model.encode(f"{SYSTEM} USER: <ev_start>")]
    assert list(prompt.after) == model.encode(f"<ev_end>\n{question} ASSISTANT:")
    assert len(drafter.tokenizer) == published.VOCAB
    prompt = verifier.prompt(question)
    text = f"USER: <video>\n{question} ASSISTANT:"
    whole = [*prompt.before, published.VOCAB + 1, *prompt.after]
    assert whole == verifier.tokenizer(text).input_ids
    assert whole.count(1) == 1 and whole[0] == 1
    assert list(prompt.before)[1:] == model.encode("USER: ")
    assert pair.vocab_size == published.VOCAB
    hidden = torch.zeros(1, verifier.width)
    assert (
        verifier.logits(hidden).shape[-1] == drafter.logits(torch.zeros(1, drafter.width)).shape[-1]
    )


def test_another_vocabulary_is_refused(config: PairConfig, tmp_path: Path) -> None:
    drafter, _ = published.write_pair(tmp_path)
    path = drafter / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(str(path))
    word = max((model.id_to_piece(i) for i in range(published.VOCAB)), key=len)
    path.write_bytes(path.read_bytes().replace(word.encode(), word[::-1].encode()))
    with pytest.raises(XsdError, match=f"tokenize differently: id .*{word[::-1]}.* 1 ids"):
        load_pair(PairConfig(PAIR, str(drafter), config.verifier, quant="fp32", device="cpu"))


@pytest.mark.slow
def test_every_stage_by_path_alone(
    folders: tuple[Path, Path],
    workplace: Path,  # noqa: F811
    runs: Callable[..., list[Any]],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = miniature.save_scenes(workplace / "dataset")
    words = ["--pair", PAIR, "--drafter", folders[0], "--verifier", folders[1], "--quant", "fp32"]
    small = ["--num_heads", 2, "--ffn_dim", 16, "--bottleneck_dim", 8, "--unroll_steps", 2]
    xsd("scenes", "--pair", PAIR, "--source", "prepared", "--dataset_dir", data)
    xsd("lm_head", *words)
    xsd("extract", *words, "--max_new_tokens", 8, "--max_questions", 2)
    (head,) = (workplace / "outputs/lm_head").rglob("lm_head.safetensors")
    (index,) = (workplace / "outputs/extract").rglob("chunked_train_1s_fp32/index.json")
    assert len(lm_head.load(head).lm_head) == published.VOCAB + 64
    assert len(open_head(head, open_store(index.parent, "train")).lm_head) == published.VOCAB
    for level in ("L1", "E1"):
        xsd("train", *words, *small, "--level", level, "--num_epochs", 1, "--batch_size", 4)
        xsd("evaluate", *words, "--level", level)
        xsd("promote", *words, "--level", level)
    trained = {run.data.tags["level"]: run.info.run_id for run in runs("train")}
    ids = {role: f"runs:/{trained[level]}" for role, level in (("prefill", "L1"), ("decode", "E1"))}
    xsd("two_phase", *words, *(w for r, i in ids.items() for w in (f"--{r}_checkpoint", i)))
    xsd(
        "benchmark", *words, "--configs", "L1+VL,E1_decode,drafter+VL", "--overlap", "inline",
        "--max_new_tokens", 8, "--max_samples", 2, "--repeats", 1, "--warmup", 0,
    )  # fmt: skip
    xsd("report", "--pair", PAIR)
    stages = ("scenes", "lm_head", "extract", "evaluate", "two_phase", "promote", "benchmark")
    assert all(runs(stage) for stage in (*stages, "report"))
    (result,) = (workplace / "outputs/benchmark").rglob("e2e_wallclock_*.json")
    summary = {row["strategy"]: row for row in read_json(result)["summary"]}
    assert set(summary) == {"vl_baseline", "L1+VL", "E1_decode", "drafter+VL"}
    assert all(row["lossless"] for row in summary.values())
    assert (workplace / "outputs/report/report.html").is_file()
