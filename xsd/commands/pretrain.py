"""``pretrain``: make the embedded tiny pair from scratch, and write its card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.cli import main
from xsd.commands import stage
from xsd.learning.pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

HELP = "train the embedded tiny pair from scratch on synthetic scenes"
UNFINISHED = ".unfinished"
"""Folder of the states that a killed pretraining goes on from; it goes when the card is written."""
HELD_OUT_RECORDINGS = 1_000_000
"""Recordings from this number on are never trained on."""


@dataclass(frozen=True)
class Config(PretrainConfig, stage.StageConfig):
    """Options of the pretrain stage."""

    pair: str = "tiny"
    """The pair whose experiment the run goes to: lab for --size lab."""
    output_dir: Path = Path("outputs/pretrain")
    """Where the weights and the card are written; copy them to xsd/pairs/tiny_weights to ship."""


def perform(config: Config) -> Product:
    """Render, train both models, examine them, save."""

    def work(run: Run, _: Mapping[str, Product]) -> None:
        from tqdm import tqdm

        from xsd.learning.pretrain.corpus import make_corpus
        from xsd.learning.pretrain.train import TinyModels, pretrain

        print(f"rendering {config.num_scenes} clips to train on and {config.num_held_out} to test")
        corpus = make_corpus(config, config.num_scenes, 0)
        models = TinyModels.new(config)
        folder = config.output_dir / run.work_name
        states = folder / UNFINISHED
        reports = pretrain(config, corpus, models, states)
        bar = tqdm(reports, desc="pretrain", unit="report")
        for report in bar:
            bar.set_postfix_str(
                f"{report.phase} {report.step}/{report.num_steps} {report.loss:.3f}"
            )
            values = {f"{report.phase}.{k.replace('.', '_')}": v for k, v in report.metrics.items()}
            run.log({f"{report.phase}.loss": report.loss, **values}, step=report.step)
        models.save(folder)
        held_out = make_corpus(config, config.num_held_out, HELD_OUT_RECORDINGS)
        card = write_card(folder, config, held_out, _made(config.device))
        shutil.rmtree(states)
        run.artifacts(folder)
        run.say(f"pretrain: {config.num_scenes} clips, {_facts_right(card)}: {folder}")

    return stage.perform(
        "pretrain",
        config,
        resolve=dict,
        rooms=["scenes", "pairs", "learning/pretrain", "card"],
        work=work,
    )


def _made(device: str) -> str:
    import torch

    from xsd.pairs.device import choose_device

    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "a CPU"
    return f"by `xsd pretrain` on {name} with torch {torch.__version__}"


def write_card(folder: Path, config: PretrainConfig, held_out: Any, made: str) -> dict[str, Any]:
    """Examine the saved pair on unseen recordings; write ``card.json`` and ``README.md``."""
    from xsd.card import examine_pair, render
    from xsd.files import write_json, write_text
    from xsd.pairs.catalog import load_folder

    device = config.device if config.size == "lab" else "cpu"
    card = examine_pair(load_folder(folder, device), held_out, config, made)
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", render(card))
    return card


def _facts_right(card: Mapping[str, Any]) -> str:
    """Of the verifier's answers about unseen recordings."""
    shares = card["verifier"]["facts_right"]
    return "facts right: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="pretrain"))
