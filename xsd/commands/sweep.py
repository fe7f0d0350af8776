"""``sweep``: search a level's hyperparameters; a parent run with a child a trial."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.adapters.config import AdapterSizes
from xsd.cli import main
from xsd.commands import stage
from xsd.commands.adapter_data import DataConfig, TrainingData, find_inputs
from xsd.config import Level, resolved
from xsd.learning.config import FitConfig
from xsd.pairs.config import PairConfig
from xsd.search_config import SearchConfig

if TYPE_CHECKING:
    from xsd.adapters.base import Adapter
    from xsd.search.trials import Trial, TrialReport
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.types import EpochReport

HELP = "search the hyperparameters of one level"
ROOMS = ("adapters", "decoding/latency", "hidden", "learning", "counts", "metrics", "search")

Inputs = Mapping[str, "Product"]


@dataclass(frozen=True)
class Config(SearchConfig, FitConfig, AdapterSizes, DataConfig, PairConfig, stage.StageConfig):
    """Options of the sweep stage; what is searched overrides those of training."""

    level: Level = Level("L4")
    """L1, L2, L3, L4, L5, L5F, B1, E1, E2, E3, X1 or text; or the published 1 to 6."""
    num_epochs: int = 3
    """Longest trial: enough to rank them; train the winner longer."""


def perform(config: Config) -> Product:
    """Search; the best trial's weights become the candidate that ``promote`` may take."""
    return stage.perform(
        "sweep",
        config,
        resolve=lambda: _inputs(config),
        rooms=ROOMS,
        work=lambda run, inputs: _sweep(run, inputs, config),
        tags={"level": config.level},
    )


def _inputs(config: Config) -> dict[str, Product]:
    """Training data of every conditioning that is searched, made once for all trials."""
    from xsd.search.space import choices, read_space
    from xsd.tracking import products

    file = products.from_path(_space_file(config))
    searched = choices(read_space(file.path, _searchable()), "conditioning")
    inputs = {**find_inputs(config, "train", config.conditioning), "space": file}
    for other in set(searched) - {config.conditioning}:
        found = find_inputs(replace(config, data=None), "train", other)
        inputs[f"data.{other}"] = found["data"]
    if config.val_data is not None:
        inputs["val_data"] = products.load(config.val_data, {"pair": config.pair})
    return inputs


def _sweep(run: Run, inputs: Inputs, config: Config) -> None:
    """Search in as many processes as were asked for, then show and publish the best."""
    from xsd.commands.workers import workers
    from xsd.search.study import storage_of

    # The same question, asked for more trials or in another place, goes on with its study.
    elsewhere = {*("num_trials", "num_workers", "storage", "stale_minutes")}
    elsewhere |= {"output_dir", "rerun", "recipe", "space"}
    asked = {name: text for name, text in resolved(config).items() if name not in elsewhere}
    digests = {role: product.digest for role, product in inputs.items()}
    from xsd.files import sha256_json

    name = f"{config.pair}-{config.level}-{sha256_json([asked, digests])[:12]}"
    storage = storage_of(config, config.output_dir / name)
    search = _Search(name, storage, dict(inputs), config)
    study = search.open()
    run.tag({"study": name, "resumes": study.user_attrs.get("run")})
    study.set_user_attr("run", run.uri)
    with workers(config.num_workers, run.run_id) as pool:
        for future in [pool.submit(search.run, run.run_id) for _ in range(config.num_workers)]:
            future.result()
    for left in search.folder.glob("trial_*"):
        # Killed between telling the study and tidying up.
        shutil.rmtree(left, ignore_errors=True)
    _publish(run, search)


@dataclass(frozen=True)
class _Search:
    """What a process needs to take part; small enough to be sent to one."""

    name: str
    storage: str
    inputs: Inputs
    config: Config

    @property
    def folder(self) -> Path:
        """Of what its trials need while they run."""
        return self.config.output_dir / self.name

    def open(self) -> Any:
        from xsd.search.study import open_study

        config = self.config
        return open_study(
            self.storage, self.name, config, seed=config.seed, num_epochs=config.num_epochs
        )

    def run(self, parent: str) -> None:
        """Try what nobody else tries, until the study has all its trials."""
        from xsd.commands.progress import progress
        from xsd.search.space import read_space
        from xsd.search.study import counted
        from xsd.search.trials import Claims, run_trials
        from xsd.tracking import store

        config, study = self.config, self.open()
        space = read_space(self.inputs["space"].path, _searchable())
        trials = _Trials(self, parent)
        reports = run_trials(
            trials.train,
            study,
            space,
            Claims(
                store.this_process(),
                store.is_gone,
                stale_seconds=60 * config.stale_minutes,
                lock=lambda: store.lock("trials"),
            ),
            metric=trials.metric,
            num_trials=config.num_trials,
        )
        with progress("sweep", config.num_trials, "trials", len(counted(study))) as bar:
            for report in reports:
                # What leads is kept by its run, wherever that keeps it.
                shutil.rmtree(_trial_folder(self.folder, report.number), ignore_errors=True)
                bar.set_postfix_str(_outcome(report))
                bar.update()


class _Trials:
    """Trains trials, in runs of their own; the data are read once and serve all."""

    def __init__(self, search: _Search, parent: str) -> None:
        from xsd.adapters.catalog import level

        self.config, self.inputs, self.parent = search.config, search.inputs, parent
        self.folder = search.folder
        self.metric = level(search.config.level).selection_metric
        self._data: dict[str, TrainingData] = {}

    def train(self, trial: Trial) -> Generator[EpochReport, None, Mapping[str, float]]:
        """One trial, from where a process that died in it left it; its run ends KILLED where the
        search stops pulling."""
        from xsd.commands.train import STATE, fit_reports, follow, history
        from xsd.tracking.run import stage_run

        config, begun = replace(self.config, **trial.params), trial.run
        folder = self._folder(trial)
        if (ended := history(folder)) and (measured := _measured(begun)) is not None:
            # It died before it could tell the study.
            yield from ended
            return measured
        tags = {"level": config.level, "trial": trial.number, "resumes": begun or None}
        tags |= {"mlflow.note.content": _listed(trial.params)}
        title = f"trial {trial.number}"
        # The parent has the options that all trials share.
        with stage_run(
            "trial", config.pair, trial.params, tags=tags, name=title, parent=self.parent
        ) as child:
            trial.run = child.uri
            data, best = self.data(config.conditioning), 0.0
            adapter, reports = fit_reports(config, data, folder / STATE)
            for report in follow(child, data, folder, adapter, reports, config):
                best = max(best, report.val[self.metric])
                yield report
            measured = self._latency(adapter, data)
            child.log({f"measured.{name}": value for name, value in measured.items()})
            if trial.leads({"accept_length": best, **measured}):
                child.artifacts(folder)
        return measured

    def _folder(self, trial: Trial) -> Path:
        """Of a trial's state and best weights, unless another trial left them."""
        from xsd.commands.train import UNFINISHED
        from xsd.files import sha256_json, write_text

        folder = _trial_folder(self.folder, trial.number)
        mark, key = folder / UNFINISHED / "key", sha256_json(trial.params)
        if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            write_text(mark, key)
        return folder

    def data(self, conditioning: str) -> TrainingData:
        if conditioning not in self._data:
            inputs = dict(self.inputs)
            inputs["data"] = inputs.get(f"data.{conditioning}", inputs["data"])
            self._data[conditioning] = TrainingData.open(inputs)
        return self._data[conditioning]

    def _latency(self, adapter: Adapter, data: TrainingData) -> dict[str, float]:
        from xsd.decoding.latency import token_ms
        from xsd.tracking import store

        if "latency_ms" not in self.config.objectives:
            return {}
        # The trials of one machine measure one after the other.
        with store.lock("latency"):
            return {"latency_ms": token_ms(adapter, data.head.lm_head)}


def _publish(run: Run, search: _Search) -> None:
    """The trials as table and figures; the best one's checkpoint as a logged model, a candidate as
    ``train`` makes them."""
    from xsd.adapters import checkpoint
    from xsd.commands.train import model_tags, model_title
    from xsd.search.study import candidate
    from xsd.tracking import products

    study = search.open()
    trials = _show(run, study)
    best = candidate(study)
    kept = products.load(best.run)
    adapter, _ = checkpoint.load(kept.path)
    config = replace(search.config, **best.params)
    metric = adapter.row.selection_metric
    data = _Trials(search, run.run_id).data(config.conditioning)
    run.dataset(data.store.path.name, data.store.digest, str(data.store.path), "train")
    tags = model_tags(data, adapter, config)
    files = [kept.path / "best_model.safetensors", kept.path / checkpoint.CONFIG]
    for path in files:
        run.artifact(path)
    run.tag({**tags, "best_trial": best.number, "best_run": kept.uri})
    metrics = {f"val.{metric}": best.accept_length, "val.accept_length": best.accept_length}
    run.log_model(model_title(tags), files, params=best.params, tags=tags, metrics=metrics)
    line = f"{metric} {best.accept_length:.3f} (val) by trial {best.number}: {_listed(best.params)}"
    states = ", ".join(f"{num} {state}" for state, num in trials["state"].value_counts().items())
    run.tag({"mlflow.note.content": f"{len(trials)} trials ({states}).\n\n{line}"})
    print(f"sweep {adapter.row.name}: {line}")


def _show(run: Run, study: Any) -> Any:
    """Table, figures and the curve of the best so far; returns the frame of trials."""
    from xsd.plots import sweep as plots
    from xsd.search.study import importance_frame, trials_frame

    trials, importance = trials_frame(study), importance_frame(study)
    run.table("trials", trials)
    parameters = sorted(
        {name for trial in study.get_trials(deepcopy=False) for name in trial.params}
    )
    figures = {
        "history": plots.history(trials),
        "parallel_coordinates": plots.parallel_coordinates(trials, parameters),
    }
    if not importance.empty:
        run.table("importance", importance)
        figures["importance"] = plots.importance(importance)
    if "latency_ms" in trials:
        figures["pareto"] = plots.pareto(trials)
    # To be hovered over and filtered; a browser for stills would take longer than some sweeps.
    run.figures(figures, still=False)
    complete = trials[trials["state"] == "complete"]
    for number, best in zip(complete["number"], complete["accept_length"].cummax(), strict=True):
        run.log({"best.accept_length": best}, step=int(number))
    run.log({f"num_{state}": num for state, num in trials["state"].value_counts().items()})
    return trials


def _trial_folder(folder: Path, number: int) -> Path:
    return folder / f"trial_{number:03d}"


def _measured(run: str) -> dict[str, float] | None:
    """What the finished run of a trial measured; None: it did not finish."""
    from xsd.tracking import query

    metrics, mark = query.finished_metrics(run), "measured."
    if metrics is None:
        return None
    return {name.removeprefix(mark): x for name, x in metrics.items() if name.startswith(mark)}


def _searchable() -> list[str]:
    """Options that a space may name: sizes and hyperparameters, but not the level or the data."""
    names = (field.name for room in (AdapterSizes, FitConfig) for field in fields(room))
    return ["conditioning", *(name for name in names if name != "seed")]


def _space_file(config: Config) -> Path:
    """The space given, the level's own, or that of its family."""
    from xsd.adapters.catalog import level
    from xsd.tracking.store import project_root

    if config.space is not None:
        return config.space
    row, folder = level(config.level), project_root() / "experiments"
    family = "bottleneck" if "bottleneck_dim" in row.sizes else row.phase
    own = folder / f"sweep_{config.level.lower()}.yaml"
    return own if own.is_file() else folder / f"sweep_{family}.yaml"


def _listed(params: Mapping[str, Any]) -> str:
    texts = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in params.items()
    }
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def _outcome(report: TrialReport) -> str:
    value = "" if report.accept_length is None else f" at {report.accept_length:.3f}"
    return f"trial {report.number} {report.state}{value}{report.reason and f': {report.reason}'}"


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="sweep"))
