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
from xsd.commands.progress import progress
from xsd.config import Level, resolved
from xsd.learning.config import FitConfig
from xsd.pairs.config import PairConfig
from xsd.search_config import SearchConfig

if TYPE_CHECKING:
    from xsd.search import TrialReport
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.types import EpochReport

HELP = "search the hyperparameters of one level"


@dataclass(frozen=True)
class Config(SearchConfig, FitConfig, AdapterSizes, DataConfig, PairConfig, stage.StageConfig):
    """Options of the sweep stage; what is searched overrides those of training."""

    level: Level = Level("L4")
    """L1, L2, L3, L4, L5, L5F, B1, E1, E2, E3, X1 or text; or the published 1 to 6."""
    num_epochs: int = 3
    """Longest trial: enough to rank them; train the winner longer."""


def perform(config: Config) -> Product:
    """Search; the best trial's weights become the candidate that ``promote`` may take."""

    def resolve() -> dict[str, Product]:
        from xsd.tracking import products

        inputs = find_inputs(config, "train", config.conditioning)
        inputs["space"] = products.from_path(_space_file(config))
        if config.val_data is not None:
            inputs["val_data"] = products.load(config.val_data, {"pair": config.pair})
        return inputs

    return stage.perform(
        "sweep",
        config,
        resolve=resolve,
        rooms=["adapters", "hidden", "learning", "metrics", "search"],
        work=lambda run, inputs: _Sweep(run, inputs, config).run(),
        tags={"level": config.level},
    )


class _Sweep:
    """One study: its data are read once and serve all trials."""

    def __init__(self, run: Run, inputs: Mapping[str, Product], config: Config) -> None:
        from xsd.adapters.catalog import level
        from xsd.files import sha256_json
        from xsd.search import read_space

        self.parent, self.config = run, config
        self.data = TrainingData.open(inputs)
        self.space = read_space(inputs["space"].path, _searchable())
        self.row = level(config.level)
        # The same question, asked for more trials or in another place, goes on with its study.
        elsewhere = {"num_trials", "output_dir", "rerun", "space"}
        asked = {k: v for k, v in resolved(config).items() if k not in elsewhere}
        digests = {role: product.digest for role, product in inputs.items()}
        self.name = f"{config.pair}-{config.level}-{sha256_json([asked, digests])[:12]}"
        self.folder = config.output_dir / self.name

    def run(self) -> None:
        """Pull trials, keep the best one's files, report."""
        import pandas as pd

        from xsd.search import best_trial, num_finished, open_study, run_trials
        from xsd.tracking.store import lock

        config, metric, rows = self.config, self.row.selection_metric, []
        journal = self.folder / "study.log"
        with lock(f"sweep-{self.name}"):
            study = open_study(
                journal, self.name, config, seed=config.seed, num_epochs=config.num_epochs
            )
            self.parent.tag({"resumes": study.user_attrs.get("run")})
            study.set_user_attr("run", self.parent.uri)
            reports = run_trials(
                self.trial, study, self.space, metric=metric, num_trials=config.num_trials
            )
            with progress("sweep", config.num_trials, "trials", num_finished(study)) as bar:
                for report in reports:
                    self._keep_only_the_best(report)
                    rows.append({**_summary(report), **report.params})
                    bar.set_postfix_str(f"trial {report.number} {report.state}: {report.value}")
                    bar.update()
            number, params, value = best_trial(study)
        self.parent.table("trials", pd.DataFrame(rows))
        self._publish(number, params, value)

    def trial(self, number: int, params: Mapping[str, Any]) -> Generator[EpochReport, None, None]:
        """Train with ``params`` in a run of its own; ends KILLED where the search stops pulling."""
        from xsd.adapters import checkpoint
        from xsd.commands.train import about, fit_reports, log_epoch
        from xsd.tracking.run import stage_run

        config = replace(self.config, **params)
        with stage_run(
            "trial",
            config.pair,
            resolved(config),
            tags={"level": config.level, "trial": number},
            name=f"trial {number}",
            parent=self.parent.run_id,
        ) as child:
            adapter, reports = fit_reports(config, self.data)
            for report in reports:
                if report.is_best:
                    extra = about(self.data, report, config)
                    checkpoint.save(adapter, self._trial_folder(number), extra=extra)
                log_epoch(child, report, self.row.selection_metric)
                yield report

    def _publish(self, number: int, params: Mapping[str, Any], value: float) -> None:
        """The best trial's checkpoint as a logged model: a candidate, as ``train`` makes them."""
        from xsd.adapters import checkpoint
        from xsd.commands.train import model_tags, model_title

        folder, metric = self._trial_folder(number), self.row.selection_metric
        adapter, _ = checkpoint.load(folder)
        self.parent.artifacts(folder)
        tags = model_tags(self.data, adapter, replace(self.config, **params))
        self.parent.tag({**tags, "best_trial": number})
        self.parent.log_model(
            model_title(tags),
            [folder / "best_model.safetensors", folder / checkpoint.CONFIG],
            params=params,
            tags=tags,
            metrics={f"val.{metric}": value, "val.accept_length": value},
        )
        chosen = ", ".join(f"{name}={item}" for name, item in params.items())
        print(f"sweep {self.row.name}: {metric} {value:.3f} (val) by trial {number}: {chosen}")

    def _keep_only_the_best(self, report: TrialReport) -> None:
        mine = self._trial_folder(report.number)
        for folder in self.folder.glob("trial_*") if report.is_best else [mine]:
            if folder != mine or not report.is_best:
                shutil.rmtree(folder, ignore_errors=True)

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial_{number:03d}"


def _searchable() -> list[str]:
    """Options that a space may name: sizes and hyperparameters, but not the level or the data."""
    names = (field.name for room in (AdapterSizes, FitConfig) for field in fields(room))
    return [name for name in names if name != "seed"]


def _space_file(config: Config) -> Path:
    from xsd.tracking.store import project_root

    if config.space is not None:
        return config.space
    folder = project_root() / "experiments"
    own = folder / f"sweep_{config.level.lower()}.yaml"
    return own if own.is_file() else folder / "sweep.yaml"


def _summary(report: TrialReport) -> dict[str, Any]:
    names = ("number", "state", "value", "num_epochs", "reason")
    return {name: getattr(report, name) for name in names}


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="sweep"))
