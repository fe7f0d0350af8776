"""``extract``: paired hidden states of both models on the same answers, in chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.commands.lm_head import pair_inputs
from xsd.commands.progress import progress
from xsd.errors import XsdError
from xsd.hidden.config import ExtractConfig
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.hidden.index import Failure, Half
    from xsd.hidden.store import HiddenStore
    from xsd.pairs.base import ModelPair
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.types import Scene

HELP = "store paired hidden states of drafter and verifier on the same answers"
ROOMS = ["scenes", "pairs", "hidden"]
"""The source that decides what extraction gives."""


@dataclass(frozen=True)
class Config(ExtractConfig, PairConfig, stage.StageConfig):
    """Options of the extract stage."""


def perform(config: Config) -> Product:
    """Answer, pair, store; an interrupted extraction goes on where it stopped."""

    def resolve() -> dict[str, Product]:
        # The pair first: a slip in its name must not cost the making of scenes.
        pair = pair_inputs(config)
        return {"dataset_dir": stage.upstream("scenes", config.dataset_dir, config), **pair}

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        from xsd.hidden.store import HiddenStore, find_folder, folder_name
        from xsd.pairs.catalog import load_pair
        from xsd.scenes.dsec import dataset_digest, load_index

        dataset = dataset_folder(inputs["dataset_dir"])
        scenes, data = load_index(dataset), dataset_digest(dataset)
        pair = load_pair(config)
        root = config.output_dir or Path("outputs/extract") / run.work_name
        halves, twin = _halves(config, scenes), _twin(config, inputs)
        run.dataset("scenes", data, str(dataset), "extract")
        for half in halves:
            folder = root / folder_name(half, pair.quant)
            said = None if twin is None else HiddenStore.open(find_folder(twin.path, half))
            _extract_half(folder, half, scenes, data, pair, config, said)
            store = HiddenStore.open(folder, verify=False)
            run.artifacts(folder, folder.name)
            run.dataset(folder.name, store.digest, str(folder), half)
            counts = {
                "num_samples": len(store),
                "num_failures": len(store.failures),
                "num_tokens": sum(len(sample.verifier_ids) for sample in store),
            }
            run.log({f"{half}.{name}": number for name, number in counts.items()})
            print(f"extract: {counts['num_samples']} {half} answers: {folder}")
        run.tag({"quant": pair.quant, "conditioning": config.conditioning})
        run.tag({f"has_{half}": "true" for half in halves})

    return stage.perform("extract", config, resolve=resolve, rooms=ROOMS, work=work)


def _twin(config: Config, inputs: Mapping[str, Product]) -> Product | None:
    """A finished extraction that differs in conditioning alone: what the verifier said is there."""
    from xsd.tracking import reuse

    if config.rerun or config.chunk_format == "pt":
        return None
    is_forced = config.conditioning == "teacher_forced"
    other = replace(config, conditioning="free_running" if is_forced else "teacher_forced")
    twin = reuse.find_finished(stage.stage_key("extract", other, inputs, ROOMS))
    if twin is not None:
        print(f"extract: the verifier's answers are those of {twin.uri}")
    return twin


def dataset_folder(scenes: Product) -> Path:
    """Where the index lies: in the run's artifacts, where they point to, or in a given folder."""
    from xsd.files import read_json
    from xsd.scenes.layout import INDEX_NAME, LINK_NAME

    folders = [scenes.path / "scenes", scenes.path]
    if (scenes.path / LINK_NAME).is_file():
        folders = [Path(read_json(scenes.path / LINK_NAME)["dataset_dir"])]
    for folder in folders:
        if (folder / INDEX_NAME).is_file():
            return folder
    raise XsdError(f"{scenes.uri}: holds no {INDEX_NAME}; give --dataset_dir or run 'xsd scenes'")


def _halves(config: Config, scenes: Sequence[Scene]) -> list[Half]:
    """What was asked for; of 'all', what there is."""
    if config.split != "all":
        return [config.split]
    is_test = {scene.split == "test" for scene in scenes}
    halves: list[Half] = ["train"] if False in is_test else []
    return [*halves, "test"] if True in is_test else halves


def _extract_half(
    folder: Path,
    half: Half,
    scenes: Sequence[Scene],
    data: str,
    pair: ModelPair,
    config: Config,
    said: HiddenStore | None,
) -> None:
    from xsd.hidden.extract import clips_together, extract, header
    from xsd.hidden.plan import plan_batches
    from xsd.hidden.writer import HiddenWriter

    batches = plan_batches(scenes, half, config, clips_together(pair, config))
    total = sum(len(batch.samples) for batch in batches)
    top = header(pair, batches, half, config, data)
    with HiddenWriter.open(folder, top, batches) as writer:
        stored = sum(len(batch.samples) for batch in batches[: writer.num_stored])
        with progress(f"extract {half}", total, "answers", initial=stored) as bar:
            _refuse_too_many(writer.failures, total, config.max_failures)
            for extracted in extract(pair, batches[writer.num_stored :], config, said):
                # Before it is stored: what was mended is then answered when the stage is run again.
                _refuse_too_many(
                    (*writer.failures, *extracted.failures), total, config.max_failures
                )
                writer.add(extracted)
                bar.update(len(extracted.batch.samples))


def _refuse_too_many(failures: Sequence[Failure], total: int, share: float) -> None:
    if len(failures) > math.floor(share * total):
        raise XsdError(
            f"{len(failures)} of {total} answers failed, more than --max_failures {share} allows; "
            f"the last: {failures[-1].key}: {failures[-1].reason}"
        )


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="extract"))
