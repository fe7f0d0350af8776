from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.hidden import miniature
from xsd.adapters import checkpoint
from xsd.adapters.catalog import build
from xsd.adapters.config import AdapterConfig
from xsd.cli import main
from xsd.cli.marked import MarkedText, Watched
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.policy import Policy
from xsd.pairs.base import Media
from xsd.pairs.tiny import WIDTH
from xsd.types import Span

WORDS = ["a", " red", " car", " turns", " left", "."]


def written(*, colour: bool = False) -> tuple[io.StringIO, MarkedText]:
    out = io.StringIO()
    text = MarkedText(out.write, lambda ids: "".join(WORDS[i] for i in ids), colour=colour)
    return out, text


def test_runs_of_drafts_are_marked_without_the_space_before_them() -> None:
    out, text = written()
    text.add([0], "gap")
    text.add([1, 2], "head")
    text.add([3], None)
    text.add([4, 5], "head")
    text.close()
    assert out.getvalue() == "{a} [red car] turns [left.]\n"


def test_colours_end_where_they_began() -> None:
    out, text = written(colour=True)
    text.add([0, 1], "head")
    text.add([2], None)
    text.close()
    assert out.getvalue() == "\x1b[32ma red\x1b[0m car\n"


def test_half_a_character_waits_for_its_other_bytes() -> None:
    out = io.StringIO()
    data = "é!".encode()
    text = MarkedText(
        out.write, lambda ids: bytes(data[i] for i in ids).decode(errors="replace"), colour=False
    )
    text.add([0], None)
    assert out.getvalue() == ""
    text.add([1, 2], None)
    assert out.getvalue() == "é!"


class Party:
    """Guesses two tokens while the verifier reads, and two whenever it is asked."""

    wants_projected = wants_prefilled = False

    def start(self, media: Media, question: str, watch: Stopwatch) -> None: ...
    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def gap_drafts(self) -> Draft:
        return Draft([0, 4])

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        # 5, or 2 followed by 3.
        return Draft([5, 2, 3], [-1, -1, 1])

    def finish(self) -> list[Span]:
        return []


def test_drafts_that_held_are_marked_and_nothing_else() -> None:
    """Each as soon as the next drafts are asked for; those that were not verified never."""
    out, text = written()
    watched = Watched(Party(), Policy(), text, 20)
    state = torch.zeros(1, 4)

    def cycle(tokens: list[int], verified: int, path: list[int]) -> str:
        draft = watched.propose(tokens, state, 1)
        watched.policy.learn(draft.cut(verified), path)
        return out.getvalue()

    watched.gap_drafts()
    assert cycle([0, 1], 3, [1]) == "{a} red"  # one of the gap's two held
    assert cycle([0, 1, 2, 4], 3, []) == "{a} red [car] left"
    assert cycle([0, 1, 2, 4, 3], 3, [1, 2]) == "{a} red [car] left turns"
    assert cycle([0, 1, 2, 4, 3, 2, 3, 5], 1, []) == "{a} red [car] left turns [car turns]."
    watched.show([0, 1, 2, 4, 3, 2, 3, 5, 2])  # as was drafted, but nobody verified it
    assert out.getvalue() == "{a} red [car] left turns [car turns]. car"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.save_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("E1")
    torch.manual_seed(0)
    config = AdapterConfig(level="E1", d_drafter=WIDTH, d_verifier=WIDTH, ffn_dim=64)
    checkpoint.save(build(config), folder)
    return folder


def words(scenes: Path, *more: object) -> list[str]:
    given = ["generate", "--dataset_dir", scenes, "--device", "cpu", "--overlap", "inline"]
    return [*map(str, [*given, "--repeats", 1, "--max_new_tokens", 12, *more])]


@pytest.mark.usefixtures("tracking")
class TestCommand:
    def test_a_head(self, scenes: Path, head: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words(scenes, "--strategy", "E1_decode", "--adapter", head)) == 0
        drafted = capsys.readouterr().out.splitlines()
        assert main(words(scenes, "--strategy", "plain")) == 0
        plain = capsys.readouterr().out.splitlines()
        assert "What are the key elements" in drafted[0]
        assert "[drafted by the head]" in drafted[1] and "no drafts" in plain[1]
        assert plain[2] and drafted[2].replace("[", "").replace("]", "") == plain[2]
        assert "drafts accepted" in drafted[3] and "drafts" not in plain[3]
        assert drafted[4].startswith("median of 1: ") and drafted[4].endswith("lossless yes")
        assert plain[4].startswith("median of 1: ") and "lossless" not in plain[4]

    def test_a_tree_too_wide_for_the_head(
        self, scenes: Path, head: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tree = words(scenes, "--strategy", "E1_tree", "--adapter", head)
        assert main([*tree, "--tree_width", "40"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "16 levels of 40 nodes behind 12 tokens exceed the head's max_positions=512" in line
        assert line.endswith("tree_width may be 1 to 31")
        assert main([*tree, "--tree_width", "31"]) == 0

    def test_one_row_shape(
        self, scenes: Path, head: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        more = (
            "--strategy",
            "E1_decode",
            "--adapter",
            head,
            "--strict",
            "--gamma",
            4,
            "--quant",
            "bf16",
        )
        assert main(words(scenes, *more)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "strict: every pass of decoding has 5 rows"
        assert lines[-1].endswith("lossless yes")

    def test_all_drafts_of_the_oracle_hold(
        self, scenes: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(words(scenes, "--strategy", "oracle", "--policy", "fixed")) == 0
        lines = capsys.readouterr().out.splitlines()
        drafted, of = re.search(r"(\d+) of (\d+) drafts accepted", lines[3]).groups()  # type: ignore[union-attr]
        assert drafted == of != "0"
        assert lines[2].count("[") == 2  # five tokens a cycle
        assert "drafts in 1 of 1" in lines[4]

    def test_the_drafter_in_the_gap(self, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        question = "What colour is the car?"
        more = ("--strategy", "drafter+VL", "--question", question, "--split", "train")
        assert main(words(scenes, *more)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith(f"(train): {question}")
        assert "{drafted while it was read}" in lines[1]
        assert lines[4].endswith("lossless yes")

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--strategy", "E1_decode"], "has no champion of E1"),
            (["--strategy", "E9"], "config 'E9' is unknown"),
            (["--strategy", "oracle,ngram"], "takes one config"),
            (["--strategy", "drafter+VL@shuffled_events"], "no other scene"),
            (["--strategy", "template+VL"], "no finished extract run"),
            (["--strategy", "plain", "--scene", "99"], "split 'test' has"),
            (["--strategy", "plain", "--scene", "a/b"], "no such clip"),
            (["--strategy", "plain", "--question", "10"], "there are 10, counted from 0"),
            (["--strategy", "plain", "--question", "-1"], "there are 10, counted from 0"),
            (["--strategy", "plain", "--question", " "], "it is empty"),
            (["--strategy", "plain", "--adapter", "x"], "takes no adapter"),
            (["--strategy", "X1+E3", "--adapter", "x"], "takes X1=URI,E3=URI"),
            (["--strategy", "plain", "--strict", "--temperature", 0.5], "strict: temperature=0.5"),
            (["--strategy", "plain", "--strict", "--last_chunk", 16], "strict: last_chunk=16"),
            (["--strategy", "plain", "--strict", "--quant", "8bit"], "strict: 8-bit layers"),
            (["--strategy", "plain", "--dataset_dir", "null"], "no finished scenes run"),
        ],
    )
    def test_a_slip_is_told_in_one_line(
        self, more: list[object], message: str, scenes: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(words(scenes, *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
