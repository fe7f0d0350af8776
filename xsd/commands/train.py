"""``train``: fit one adapter on stored states; validation accept length chooses its weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xsd.adapters.config import AdapterSizes
from xsd.cli import main
from xsd.commands import stage
from xsd.commands.adapter_data import DataConfig, TrainingData, find_inputs
from xsd.commands.processes import Processes, lead_or_serve
from xsd.commands.progress import progress
from xsd.config import Level, resolved, variant
from xsd.errors import XsdError
from xsd.learning.config import FitConfig
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.adapters.base import Adapter
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.types import EpochReport

HELP = "train the adapter of one level"
ROOMS = ["adapters", "learning", "counts", "metrics", "decoding/accept"]
"""The source that decides what training gives."""
UNFINISHED = ".unfinished"
"""Folder of a training's state; it goes when the training ends."""
HISTORY = "history.json"
STATE = f"{UNFINISHED}/state.safetensors"

T = TypeVar("T")


@dataclass(frozen=True)
class Config(FitConfig, AdapterSizes, DataConfig, PairConfig, stage.StageConfig):
    """Options of the train stage."""

    level: Level = Level("L1")
    """L1, L2, L3, L4, L5, L5F, B1, E1, E2, E3, X1 or text; or the published 1 to 6."""
    output_dir: Path = Path("outputs/train")
    """A folder <level>/<level>_<time> is made in it."""
    resume: bool = True
    """Go on with an interrupted training of the same configuration; false: begin anew."""


def perform(config: Config, processes: Processes | None = None) -> Product:
    """Train, keep the best epoch's weights as a logged model.

    Args:
        processes: of the launch, of which this is the main one; None: nobody helps.
    """
    together = processes or Processes()

    def resolve() -> dict[str, Product]:
        from xsd.tracking import products

        inputs = find_inputs(config, "train", config.conditioning)
        if config.val_data is not None:
            inputs["val_data"] = products.load(config.val_data, {"pair": config.pair})
        return inputs

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        from xsd.learning.keeper import StateHeldError

        data = TrainingData.open(inputs)
        run.dataset(data.store.path.name, data.store.digest, str(data.store.path), "train")
        folder = _folder(config, str(run.key))
        try:
            # The others train along; what they read must not be looked for twice.
            state = together.tell(Task(dict(inputs), (folder / STATE).resolve())).state
            adapter, reports = fit_reports(config, data, state, together)
            epochs = _shown(follow(run, data, folder, adapter, reports, config), config, adapter)
        except XsdError as error:
            # Refused before its first epoch, a training leaves nothing to go on with.
            if not isinstance(error, StateHeldError) and not (folder / HISTORY).is_file():
                shutil.rmtree(folder)
            raise
        _keep(run, data, folder, adapter, epochs, config)
        finished.append(folder / UNFINISHED)

    finished: list[Path] = []
    product = stage.perform(
        "train", config, resolve=resolve, rooms=ROOMS, work=work, tags={"level": config.level}
    )
    # Only now: a training whose run did not end well is taken up again.
    for path in finished:
        shutil.rmtree(path)
    return product


def part(of: type[T], config: Any) -> T:
    """The fields of one room's configuration, out of a command's."""
    return of(**{field.name: getattr(config, field.name) for field in fields(of)})  # type: ignore[arg-type]


def new_adapter(config: Any, data: TrainingData) -> Adapter:
    """Initialised by the seed, on the device asked for."""
    import torch

    from xsd.adapters.catalog import build, configure
    from xsd.pairs.device import choose_device

    widths = data.store.d_drafter, data.store.d_verifier
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapter = build(configure(config.level, *widths, part(AdapterSizes, config)))
    return adapter.to(choose_device(config.device))


@dataclass(frozen=True)
class Task:
    """What the main process tells the others to train on."""

    inputs: Mapping[str, Product]
    state: Path


def fit_reports(
    config: Any,
    data: TrainingData,
    state: Path | None = None,
    processes: Processes | None = None,
) -> tuple[Adapter, Iterator[EpochReport]]:
    """A new adapter, and the reports that train it as they are pulled."""
    from xsd.learning.batches import TrainBatches
    from xsd.learning.fit import fit

    together = processes or Processes()
    adapter, settings = new_adapter(config, data), part(FitConfig, config)
    device = next(adapter.parameters()).device
    batches = TrainBatches(
        data.store,
        adapter.row,
        batch_size=config.batch_size,
        seed=config.seed,
        head=data.head,
        device=device,
        share=(together.rank, together.count),
    )
    reports = fit(
        adapter,
        batches,
        settings,
        data.scorer(adapter.row, settings, together),
        lm_head=data.head.lm_head.to(device),
        state=state,
    )
    return adapter, reports


def log_epoch(run: Run, report: EpochReport, selection: str) -> None:
    """One epoch's values; the step is the optimizer's."""
    values = {f"train.{name}": value for name, value in report.train.items()}
    values |= {f"val.{name}": value for name, value in report.val.items()}
    values |= {"val.accept_length": report.val[selection], "epoch": report.epoch}
    values |= {"learning_rate": report.learning_rate, "epoch_seconds": report.seconds}
    run.log(values, step=report.step)


def about(data: TrainingData, best: EpochReport, config: Any) -> dict[str, Any]:
    """What a checkpoint says of itself, beside its architecture."""
    return {
        **data.tags,
        "pair": config.pair,
        "loss": loss_of(config),
        "provenance": dict(data.store.header.provenance),
        "best": asdict(best),
        "training": resolved(config),
    }


def model_tags(data: TrainingData, adapter: Adapter, config: Any) -> dict[str, str]:
    """What run and logged model are found and judged by."""
    return {
        **data.tags,
        "pair": config.pair,
        "level": adapter.row.name,
        "loss": loss_of(config),
        "selection_metric": adapter.row.selection_metric,
        "deployable": str(adapter.deployable).lower(),
    }


def model_title(tags: Mapping[str, object]) -> str:
    """The variant, as a logged model may be called: MLflow refuses a colon there."""
    return variant(tags).replace(":", "-")


def loss_of(config: Any) -> str:
    """The loss asked for, else the level's own."""
    from xsd.adapters.catalog import level

    return str(config.loss or level(config.level).loss)


def follow(
    run: Run,
    data: TrainingData,
    folder: Path,
    adapter: Adapter,
    reports: Iterator[EpochReport],
    config: Any,
) -> Iterator[EpochReport]:
    """The epochs of a training from its first, whoever began it: the reports that ``folder`` has,
    then those that are pulled. Each is logged; the best weights and the history are kept."""
    from xsd.adapters import checkpoint
    from xsd.files import write_json

    metric, known = adapter.row.selection_metric, history(folder)
    for earlier in list(known):
        log_epoch(run, earlier, metric)
        yield earlier
    for report in reports:
        if report.epoch < len(known):
            # It was killed here, before the state could say that this one was taken in.
            continue
        if report.is_best:
            checkpoint.save(adapter, folder, extra=about(data, report, config))
        known.append(report)
        write_json(folder / HISTORY, [asdict(one) for one in known])
        log_epoch(run, report, metric)
        yield report


def history(folder: Path) -> list[EpochReport]:
    """The epochs that a training in this folder has told of."""
    from xsd.files import read_json
    from xsd.types import EpochReport

    path = folder / HISTORY
    return [EpochReport(**values) for values in read_json(path)] if path.is_file() else []


def _shown(reports: Iterator[EpochReport], config: Config, adapter: Adapter) -> list[EpochReport]:
    """All of them, pulled behind a progress bar."""
    metric, pulled = adapter.row.selection_metric, []
    with progress(f"train {config.level}", config.num_epochs, "epochs") as bar:
        for report in reports:
            pulled.append(report)
            bar.set_postfix_str(f"{metric} {report.val[metric]:.3f}", refresh=False)
            bar.update()
    return pulled


def _keep(
    run: Run,
    data: TrainingData,
    folder: Path,
    adapter: Adapter,
    epochs: Sequence[EpochReport],
    config: Config,
) -> None:
    """Files, figure, logged model, and one line about it."""
    from xsd.adapters import checkpoint
    from xsd.plots.learning import training_curves

    best = [report for report in epochs if report.is_best][-1]
    row, tags = adapter.row, model_tags(data, adapter, config)
    checkpoint.save(adapter, folder, name="final_model", extra=about(data, best, config))
    run.artifacts(folder)
    run.figures({"training_curves": training_curves(row.name, epochs)}, folder)
    run.tag({**tags, "mlflow.runName": f"train {variant(tags)}"})
    accept_length = best.val[row.selection_metric]
    metrics = {f"val.{name}": value for name, value in best.val.items()}
    run.log_model(
        model_title(tags),
        [folder / "best_model.safetensors", folder / checkpoint.CONFIG],
        params=asdict(adapter.config),
        tags=tags,
        metrics={**metrics, "val.accept_length": accept_length},
        step=best.step,
    )
    num_parameters = sum(x.numel() for x in adapter.parameters())
    run.log({"best_epoch": best.epoch, "num_parameters": num_parameters}, step=best.step)
    run.say(f"train {row.name}: {row.selection_metric} {accept_length:.3f} (val): {folder}")


def _folder(config: Config, key: str) -> Path:
    """The folder of an interrupted training with this key, else a new one."""
    from xsd.files import write_text

    root = config.output_dir / config.level
    mark = Path(UNFINISHED) / "key"
    for path in sorted(root.glob(f"{config.level}_*/{mark}")):
        if config.resume and path.read_text(encoding="utf-8") == key:
            return path.parent.parent
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    names = [f"{config.level}_{stamp}", *(f"{config.level}_{stamp}_{n}" for n in range(2, 100))]
    folder = next(root / name for name in names if not (root / name).exists())
    write_text(folder / mark, key)
    return folder


def run(config: Config) -> None:
    lead_or_serve(
        config.device,
        lambda processes: perform(config, processes),
        lambda task, processes: _serve(task, config, processes),
    )


def _serve(task: Task, config: Config, processes: Processes) -> None:
    """A share of a training that the main process leads."""
    _, reports = fit_reports(config, TrainingData.open(task.inputs), task.state, processes)
    for _ in reports:
        pass


if __name__ == "__main__":
    raise SystemExit(main(command="train"))
