"""``scenes``: make synthetic driving scenes, or index a folder in the data set's layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.scenes.config import ScenesConfig

if TYPE_CHECKING:
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

HELP = "make synthetic scenes, or index a prepared data set"


@dataclass(frozen=True)
class Config(ScenesConfig, stage.StageConfig):
    """Options of the scenes stage."""

    pair: str = "tiny"
    """Pair whose experiment the run goes to."""


def perform(config: Config) -> Product:
    """Make or index the scenes; the product is the data set's folder, or a link to it."""

    def work(run: Run, _: Mapping[str, Product]) -> None:
        from tqdm import tqdm

        from xsd.scenes.dataset import make_scenes
        from xsd.scenes.dsec import dataset_digest
        from xsd.scenes.language import answer

        # Resumable: the folder's name holds everything its files depend on.
        root = config.output_dir / run.work_name
        total = config.num_train + config.num_val + config.num_test
        made = make_scenes(
            replace(config, output_dir=root), lambda facts, q: answer(facts, q, "verifier")
        )
        splits = Counter(
            record.split
            for record in tqdm(
                made, desc="scenes", unit="clip",
                total=total if config.source == "synthetic" else None,
            )
        )  # fmt: skip
        folder = root if config.source == "synthetic" else config.dataset_dir
        assert folder is not None
        digest = dataset_digest(folder)
        run.dataset(config.source, digest, str(folder), "scenes")
        run.log({f"num_{split}": number for split, number in splits.items()})
        run.tag({"xsd.digest": digest})
        if config.source == "synthetic":
            run.artifacts(root, "scenes")

    return stage.perform(
        "scenes", config, resolve=dict, rooms=["scenes"], work=work, tags={"source": config.source}
    )


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="scenes"))
