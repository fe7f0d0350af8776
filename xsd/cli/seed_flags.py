"""Every flag of the published scripts, and what it is called here.

The stages accept the old names beside their own. A test compares the defaults: where ours differs,
the row says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from xsd.config import Level
from xsd.errors import XsdError


@dataclass(frozen=True, slots=True)
class SeedFlag:
    """One flag of one published script."""

    stage: str
    name: str
    default: str | int | float | bool | None
    """As published; None: required, or none."""
    ours: str | None
    """Field of the stage's configuration; None: nothing is left to choose, ``why`` is printed."""
    why: str = ""
    """Why our default differs, or why there is nothing to choose."""


_ALWAYS_CHUNKED: Final = "--chunked is always on: data is read and written in chunks"
_NEWEST: Final = "none given: the newest finished run of the stage before"
_RUN_FOLDER: Final = "outputs/<stage>, beside the copy that the run keeps"
_B1: Final = "--vlm_only with level 5 is level B1"

SEED_FLAGS: Final = (
    SeedFlag("lm_head", "output_path", None, "output_path", _RUN_FOLDER),
    SeedFlag("extract", "dataset_dir", None, "dataset_dir", _NEWEST),
    SeedFlag("extract", "output_dir", "./data", "output_dir", _RUN_FOLDER),
    SeedFlag("extract", "split", "train", "split", "all: both halves in one run"),
    SeedFlag("extract", "chunked", False, None, _ALWAYS_CHUNKED),
    SeedFlag("extract", "chunk_size", 1000, "chunk_size"),
    SeedFlag("extract", "quant", "4bit", "quant", "null: the pair's own precision"),
    SeedFlag("extract", "max_samples", -1, "max_samples"),
    SeedFlag("extract", "max_questions", 10, "max_questions"),
    SeedFlag("extract", "max_new_tokens", 50, "max_new_tokens"),
    SeedFlag("extract", "resume", False, None, "--resume is always on: whole chunks are kept"),
    SeedFlag("extract", "save_interval", 1000, None, "--save_interval: every chunk is saved whole"),
    SeedFlag("train", "train_data", None, "data", _NEWEST),
    SeedFlag("train", "val_data", None, "val_data"),
    SeedFlag("train", "adapter_level", 1, "level", "L1: the same level by name"),
    SeedFlag("train", "num_epochs", 50, "num_epochs"),
    SeedFlag("train", "batch_size", 64, "batch_size"),
    SeedFlag("train", "learning_rate", 1e-3, "learning_rate"),
    SeedFlag("train", "early_stopping", 10, "early_stopping"),
    SeedFlag("train", "vlm_only", False, "level", _B1),
    SeedFlag("train", "bottleneck_dim", None, "bottleneck_dim"),
    SeedFlag("train", "num_heads", 8, "num_heads"),
    SeedFlag("train", "num_layers", 1, "num_layers"),
    SeedFlag("train", "ffn_dim", 2048, "ffn_dim"),
    SeedFlag("train", "output_dir", "./tasks/", "output_dir", _RUN_FOLDER),
    SeedFlag("evaluate", "checkpoint", None, "checkpoint"),
    SeedFlag("evaluate", "test_data", None, "data"),
    SeedFlag("evaluate", "lm_head", None, "lm_head"),
    SeedFlag("evaluate", "output_dir", None, "output_dir", _RUN_FOLDER),
    SeedFlag("evaluate", "batch_size", 64, "batch_size"),
    SeedFlag("evaluate", "vlm_only", False, "level", _B1),
    SeedFlag("evaluate", "gamma_decode", 5, "gamma"),
    SeedFlag("evaluate", "egpt_prefill_ms", 130.0, "drafter_prefill_ms"),
    SeedFlag("evaluate", "vl_prefill_ms", 310.0, "verifier_prefill_ms"),
    SeedFlag("two_phase", "prefill_checkpoint", None, "prefill_checkpoint"),
    SeedFlag("two_phase", "decode_checkpoint", None, "decode_checkpoint"),
    SeedFlag("two_phase", "test_data", None, "data"),
    SeedFlag("two_phase", "lm_head", None, "lm_head"),
    SeedFlag("benchmark", "dataset_dir", None, "dataset_dir", _NEWEST),
    SeedFlag("benchmark", "adapter_dir", "./tasks/", "adapter_dir", "null: the champions"),
    SeedFlag("benchmark", "max_samples", None, "max_samples", "a short run by default; -1: all"),
    SeedFlag("benchmark", "max_new_tokens", 50, "max_new_tokens"),
    SeedFlag("benchmark", "gamma", 1, "gamma", "heads are unrolled: one draft would waste them"),
    SeedFlag("benchmark", "warmup", 3, "warmup"),
    SeedFlag("benchmark", "configs", None, "configs", "all, by its name"),
    SeedFlag("benchmark", "output_dir", "./tasks/", "output_dir", _RUN_FOLDER),
)

SYNONYMS: Final = (SeedFlag("sweep", "n_trials", None, "num_trials"),)
"""Flags that a user of other tools would expect."""

_VLM_ONLY: Final = "vlm_only"


def translate(stage: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put our names for the published ones.

    Returns:
        The flags in our spelling, and one note for each that there is nothing left to choose of.

    Raises:
        XsdError: ``--vlm_only`` beside another level than 5.
    """
    rows = {row.name: row for row in (*SEED_FLAGS, *SYNONYMS) if row.stage == stage}
    rows["chunked"] = SeedFlag(stage, "chunked", False, None, _ALWAYS_CHUNKED)
    words: list[str] = []
    notes: list[str] = []
    is_vlm_only = False
    for name, text in _pairs(argv):
        row = rows.get(name.removeprefix("--").replace("-", "_"))
        if row is None:
            words += [name] if text is None else [name, text]
        elif row.name == _VLM_ONLY:
            is_vlm_only = text not in ("false", "null")
        elif row.ours is None:
            notes.append(row.why)
        else:
            words += [f"--{row.ours}"] if text is None else [f"--{row.ours}", text]
    if is_vlm_only:
        words = _as_b1(stage, words)
    return words, list(dict.fromkeys(notes))


def epilog(stage: str) -> str:
    """For ``--help``: the old names that differ from ours."""
    renamed = [
        f"--{row.name} = --{row.ours}"
        for row in SEED_FLAGS
        if row.stage == stage and row.ours not in (None, row.name) and row.name != _VLM_ONLY
    ]
    return f"Published names are accepted too: {', '.join(renamed)}." if renamed else ""


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Flags with their values; a word that belongs to no flag comes alone."""
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if word.startswith("--") and equals:
            yield name, text
        elif word.startswith("--") and words and not words[0].startswith("--"):
            yield name, words.pop(0)
        else:
            yield word, None


def _as_b1(stage: str, words: list[str]) -> list[str]:
    """The level that ``--vlm_only`` means; evaluate may leave the level to the checkpoint."""
    given = [text for name, text in _pairs(words) if name == "--level" and text is not None]
    level = Level(given[-1]) if given else Level("L5") if stage == "evaluate" else Level("L1")
    if level not in ("L5", "B1"):
        raise XsdError(f"--vlm_only belongs to level 5, not {level}; or say --level B1")
    return [*words, "--level", "B1"]
