"""Hyperparameter search: the only importer of Optuna.

A search pulls epoch reports from an objective and prunes by ceasing to pull; it knows neither
MLflow nor the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from xsd.errors import XsdError
from xsd.search_config import SearchConfig
from xsd.types import EpochReport

Params = Mapping[str, Any]
Space = Mapping[str, BaseDistribution]
Objective = Callable[[int, Params], Generator[EpochReport, None, None]]
"""Trial number and parameters -> the reports of its epochs, as ``learning.fit`` yields them."""

_KINDS: Final[Mapping[str, type[BaseDistribution]]] = {
    "float": FloatDistribution,
    "int": IntDistribution,
    "categorical": CategoricalDistribution,
}


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What became of one trial."""

    number: int
    params: Params
    state: Literal["complete", "pruned", "failed"]
    value: float | None
    """Best value of the searched metric over its epochs; None if there was none."""
    num_epochs: int
    is_best: bool
    """Better than every trial before it (pruned ones cannot be)."""
    reason: str = ""
    """Why it failed."""


def read_space(path: Path, allowed: Collection[str]) -> Space:
    """Read ``name -> {type: float|int|categorical, low, high, log, step, choices}``.

    Raises:
        XsdError: unreadable, a name that is not ``allowed``, or a range that is none.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise XsdError(f"{path}: cannot be read as YAML ({error}); check --space") from error
    if not isinstance(values, dict) or not values:
        raise XsdError(f"{path}: a search space maps names to ranges")
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise XsdError(f"{path}: {unknown[0]!r} cannot be searched; it is no option of training")
    return {name: _distribution(path, name, value) for name, value in values.items()}


def open_study(
    path: Path, name: str, config: SearchConfig, *, seed: int, num_epochs: int
) -> optuna.Study:
    """Open or resume a study that maximises; its journal is a file, and one process writes it.

    Trials that an interruption left running are told failed: they are searched again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        pruner=_pruner(config, num_epochs),
    )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    # A resumed sampler must not draw the first trials once more.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.trials), n_startup_trials=config.num_startup_trials
    )
    return study


def run_trials(
    objective: Objective, study: optuna.Study, space: Space, *, metric: str, num_trials: int
) -> Iterator[TrialReport]:
    """Run the trials that are missing of ``num_trials`` and report each when it ends.

    A trial whose objective raises ``XsdError`` (a loss that is not finite, sizes that do not fit)
    counts as failed and the search goes on.

    Args:
        metric: key of ``EpochReport.val``; higher is better.
    """
    for _ in range(num_trials - num_finished(study)):
        trial = study.ask(fixed_distributions=dict(space))
        yield _run(objective, study, trial, metric)


def num_finished(study: optuna.Study) -> int:
    """Trials that were completed or pruned."""
    finished = (TrialState.COMPLETE, TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=finished))


def best_trial(study: optuna.Study) -> tuple[int, Params, float]:
    """Number, parameters and value of the best trial.

    Raises:
        XsdError: none was completed.
    """
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise XsdError("no trial was completed; see the failed ones, or widen --space")
    best = study.best_trial
    assert best.value is not None, "completed trials have a value"
    return best.number, best.params, best.value


def _run(
    objective: Objective, study: optuna.Study, trial: optuna.Trial, metric: str
) -> TrialReport:
    before = _best_value(study)
    value: float | None = None
    num_epochs = 0
    state, reason = TrialState.COMPLETE, ""
    reports = objective(trial.number, trial.params)
    try:
        for report in reports:
            num_epochs += 1
            value = max(report.val[metric], -math.inf if value is None else value)
            # The kept checkpoint is the best epoch's, so a trial is judged by its best so far.
            trial.report(value, step=report.epoch)
            if trial.should_prune():
                state = TrialState.PRUNED
                break
    except XsdError as error:
        state, reason = TrialState.FAIL, str(error)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    finally:
        reports.close()
    if state is TrialState.COMPLETE and value is None:
        state, reason = TrialState.FAIL, "it reported no epoch"
    study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
    names: Final = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
    return TrialReport(
        number=trial.number,
        params=trial.params,
        state=names.get(state, "failed"),  # type: ignore[arg-type]
        value=value,
        num_epochs=num_epochs,
        is_best=state is TrialState.COMPLETE and (before is None or _best_value(study) > before),
        reason=reason,
    )


def _best_value(study: optuna.Study) -> Any:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max((trial.value for trial in complete if trial.value is not None), default=None)


def _pruner(config: SearchConfig, num_epochs: int) -> optuna.pruners.BasePruner:
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource=num_epochs)
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=config.num_startup_trials, n_warmup_steps=max(1, num_epochs // 5)
        )
    return optuna.pruners.NopPruner()


def _distribution(path: Path, name: str, value: Any) -> BaseDistribution:
    if not isinstance(value, dict) or value.get("type") not in _KINDS:
        raise XsdError(f"{path}: {name}: 'type' must be one of {', '.join(_KINDS)}")
    options = {key: item for key, item in value.items() if key != "type"}
    try:
        return _KINDS[value["type"]](**options)
    except (TypeError, ValueError) as error:
        raise XsdError(f"{path}: {name}: {error}") from error
