"""``scenes``: make synthetic scenes, cut raw DSEC, simulate a video's events, or index a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.scenes.config import ScenesConfig

if TYPE_CHECKING:
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

HELP = "make synthetic scenes, cut raw DSEC or a video, or index a prepared data set"


@dataclass(frozen=True)
class Config(ScenesConfig, stage.StageConfig):
    """Options of the scenes stage."""

    pair: str = "tiny"
    """Pair whose experiment the run goes to."""


def perform(config: Config) -> Product:
    """Make or index the scenes; the product is the data set's folder, or a link to it."""

    def work(run: Run, _: Mapping[str, Product]) -> None:
        from tqdm import tqdm

        from xsd.scenes.dataset import make_scenes, num_clips
        from xsd.scenes.dsec import dataset_digest
        from xsd.scenes.language import answer

        # Resumable: the folder's name holds everything its files depend on.
        root = config.output_dir / run.work_name
        made = make_scenes(
            replace(config, output_dir=root), lambda facts, q: answer(facts, q, "verifier")
        )
        splits = Counter(
            record.split
            for record in tqdm(
                made, desc="scenes", unit="clip", total=num_clips(config),
            )
        )  # fmt: skip
        folder = config.dataset_dir if config.source == "prepared" else root
        assert folder is not None
        digest = dataset_digest(folder)
        run.dataset(config.source, digest, str(folder), "scenes")
        run.log({f"num_{split}": number for split, number in splits.items()})
        parts = ", ".join(f"{number} {split}" for split, number in sorted(splits.items()))
        run.say(f"scenes: {parts or 'no'} clips ({config.source}): {folder}")
        run.tag({"xsd.digest": digest})
        if folder == root:
            run.artifacts(root, "scenes")
        else:
            run.artifact(_link(folder, digest))

    return stage.perform(
        "scenes",
        config,
        resolve=lambda: _source(config),
        rooms=["scenes"],
        work=work,
        tags={"source": config.source},
    )


def _link(folder: Path, digest: str) -> Path:
    """The file by which later stages find a folder that stays where it is."""
    from xsd.files import write_json
    from xsd.scenes.layout import LINK_NAME

    path = Path("outputs/scenes") / digest[:12] / LINK_NAME
    write_json(path, {"dataset_dir": str(folder.resolve()), "digest": digest})
    return path


def _source(config: Config) -> dict[str, Product]:
    """What the scenes are taken from: a changed file there makes a new run."""
    from xsd.files import sha256_json
    from xsd.scenes.dataset import plan
    from xsd.scenes.dsec import dataset_digest
    from xsd.scenes.layout import INDEX_NAME
    from xsd.tracking.products import Product

    folder = config.dataset_dir
    if config.source == "synthetic" or folder is None or not folder.exists():
        return {}
    if config.source != "prepared":
        digest = sha256_json([job.digest for job in plan(config)])
    elif (folder / INDEX_NAME).is_file():
        digest = dataset_digest(folder)
    else:
        digest = sha256_json(sorted(str(path) for path in folder.glob("event_npy/*/*")))
    return {"dataset_dir": Product(str(folder), folder, digest)}


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="scenes"))
