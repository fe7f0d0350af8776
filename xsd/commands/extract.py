"""``extract``: paired hidden states of both models on the same answers, in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.commands.lm_head import pair_inputs
from xsd.commands.processes import Processes, lead_or_serve
from xsd.errors import XsdError
from xsd.hidden.config import ExtractConfig
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.commands.extract_half import Totals
    from xsd.hidden.index import Half
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.types import Scene

HELP = "store paired hidden states of drafter and verifier on the same answers"
ROOMS = ["scenes", "pairs", "hidden"]
"""The source that decides what extraction gives."""


@dataclass(frozen=True)
class Config(ExtractConfig, PairConfig, stage.StageConfig):
    """Options of the extract stage."""


def perform(config: Config, processes: Processes | None = None) -> Product:
    """Answer, pair, store; an interrupted extraction goes on where it stopped.

    Args:
        processes: of the launch, of which this is the main one; None: nobody helps.
    """
    processes = processes or Processes()

    def resolve() -> dict[str, Product]:
        # The pair first: a slip in its name must not cost the making of scenes.
        pair = pair_inputs(config)
        return {"dataset_dir": stage.upstream("scenes", config.dataset_dir, config), **pair}

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        from xsd.commands.extract_half import Task, extract_half
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
            said = None if twin is None else find_folder(twin.path, half)
            task = processes.tell(Task(folder.resolve(), half, dataset.resolve(), data, said))
            totals = extract_half(task, pair, config, processes)
            store = HiddenStore.open(folder, verify=False)
            run.artifacts(folder, folder.name)
            run.dataset(folder.name, store.digest, str(folder), half)
            counts = {
                "num_samples": len(store),
                "num_failures": len(store.failures),
                "num_tokens": sum(len(sample.verifier_ids) for sample in store),
            }
            run.log({f"{half}.{name}": number for name, number in counts.items()})
            run.log(_measured(half, totals))
            if num_halvings := sum(done.num_halvings for done in totals):
                print(f"extract: memory was too small {num_halvings} times; batches were halved")
            run.say(f"extract: {counts['num_samples']} {half} answers: {folder}")
        run.tag({"quant": pair.quant, "conditioning": config.conditioning})
        run.tag({f"has_{half}": "true" for half in halves})

    return stage.perform("extract", config, resolve=resolve, rooms=ROOMS, work=work)


def _measured(half: Half, totals: Sequence[Totals]) -> dict[str, float]:
    """Of what this run did itself: of an interrupted extraction that is the rest."""
    from xsd.commands.extract_half import Totals

    num_answers = sum(done.num_answers for done in totals)
    if not num_answers:
        return {}
    together = Totals()
    for done in totals:
        together.add_seconds(done.seconds)
    slowest = max(done.seconds["all"] for done in totals)
    found = {
        f"measured.{half}.pairs_per_second": num_answers / slowest,
        f"{half}.num_processes": len(totals),
        f"{half}.num_halvings": sum(done.num_halvings for done in totals),
    }
    return found | {
        f"measured.{half}.{name.replace(' ', '_')}_s": seconds
        for name, seconds in together.seconds.items()
    }


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


def run(config: Config) -> None:
    from xsd.commands.extract_half import extract_half
    from xsd.pairs.catalog import load_pair

    pair = cache(lambda: load_pair(config))
    lead_or_serve(
        config.device,
        lambda processes: perform(config, processes),
        lambda task, processes: extract_half(task, pair(), config, processes),
    )


if __name__ == "__main__":
    raise SystemExit(main(command="extract"))
