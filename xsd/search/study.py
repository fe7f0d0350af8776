"""A study: opened by name in a storage that processes and machines share, and read as frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import optuna
import pandas as pd
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from xsd.errors import XsdError
from xsd.search_config import SearchConfig

STORAGE_VARIABLE: Final = "XSD_STORAGE"
DIRECTIONS: Final = {"accept_length": "maximize", "latency_ms": "minimize"}
LOST: Final = "lost"
"""State of a trial that was interrupted or withdrawn: it counts for nothing."""
_STATES: Final = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}
_MIN_TRIALS: Final = 4
"""Completed trials below which the importance of a parameter is a guess."""
_OWN_JOURNAL: Final = "study.log"
_SQLITE_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Candidate:
    """The trial that a search chose."""

    number: int
    params: Mapping[str, Any]
    accept_length: float
    run: str
    """URI of what it left."""


def storage_of(config: SearchConfig, folder: Path) -> str:
    """URL or path of the study's storage: the flag's, the environment's, or a file in ``folder``.

    Raises:
        XsdError: the flag holds a password, which would be kept with the run.
    """
    given = config.storage
    if given is None:
        return os.environ.get(STORAGE_VARIABLE) or str(folder / _OWN_JOURNAL)
    if "://" in given and _url(given).password:
        raise XsdError(f"--storage holds a password; put the URL into {STORAGE_VARIABLE} instead")
    return given


def open_study(
    storage: str, name: str, config: SearchConfig, *, seed: int, num_epochs: int
) -> optuna.Study:
    """Open a study, or make it.

    Args:
        num_epochs: of the longest trial; what Hyperband takes for its resource.

    Raises:
        XsdError: the storage cannot be opened, or its study searches for something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [DIRECTIONS[objective] for objective in config.objectives]
    try:
        study = optuna.create_study(
            storage=_open(storage),
            study_name=name,
            directions=directions,
            load_if_exists=True,
            pruner=_pruner(config, num_epochs),
            sampler=_Numbered(seed, config.num_startup_trials),
        )
    except (ImportError, OSError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise XsdError(
            f"storage {_shown(storage)}: cannot be opened ({reason}); check --storage"
        ) from error
    study.set_user_attr("objectives", list(config.objectives))
    return study


def objectives(study: optuna.Study) -> list[str]:
    """Names of the values of a trial, in their order."""
    return list(study.user_attrs["objectives"])


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were searched or are being searched; lost ones are left out."""
    return [trial for trial in study.get_trials(deepcopy=False) if state_of(trial) != LOST]


def state_of(trial: FrozenTrial) -> str:
    """``complete``, ``pruned``, ``failed`` (it could not be trained), ``running`` or ``lost``."""
    if trial.state is TrialState.FAIL:
        return "failed" if "reason" in trial.user_attrs else LOST
    return _STATES[trial.state]


def candidate(study: optuna.Study) -> Candidate:
    """The completed trial of the longest accept length; of several, it is on the Pareto front.

    Raises:
        XsdError: none was completed.
    """
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise XsdError("no trial was completed; see the failed ones, or widen --space")
    best = max(study.best_trials, key=lambda trial: (trial.values[0], -trial.number))
    return Candidate(best.number, best.params, best.values[0], best.user_attrs["progress"]["run"])


def leads(study: optuna.Study, values: Mapping[str, float]) -> bool:
    """Whether no completed trial is as good in every objective."""
    signs = [1 if DIRECTIONS[name] == "maximize" else -1 for name in values]
    mine = list(values.values())
    return not any(
        all(
            sign * other >= sign * value
            for sign, other, value in zip(signs, trial.values, mine, strict=True)
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    )


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """A row a counted trial.

    Columns: number, state, the objectives (of a pruned trial its best so far), num_epochs, seconds,
    on_front (no other is better in every objective), run, reason, and the searched parameters.
    """
    front = {trial.number for trial in study.best_trials} if _any_complete(study) else set()
    names = objectives(study)
    rows = []
    for trial in counted(study):
        reported = trial.intermediate_values
        values = trial.values or [max(reported.values())] if trial.values or reported else []
        progress = trial.user_attrs.get("progress", {})
        began, ended = trial.datetime_start, trial.datetime_complete
        rows.append(
            {
                "number": trial.number,
                "state": state_of(trial),
                **{name: float("nan") for name in names},
                **dict(zip(names, values, strict=False)),
                "num_epochs": progress.get("num_epochs", 0),
                "seconds": (ended - began).total_seconds() if began and ended else float("nan"),
                "on_front": trial.number in front,
                "run": progress.get("run", ""),
                "reason": trial.user_attrs.get("reason", ""),
                **trial.params,
            }
        )
    return pd.DataFrame(rows)


def importance_frame(study: optuna.Study) -> pd.DataFrame:
    """Share of an objective's variance that a parameter explains (fANOVA, Hutter 2014).

    Columns: objective, parameter, importance. Empty below four completed trials.
    """
    columns = ["objective", "parameter", "importance"]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    rows = []
    for index, name in enumerate(objectives(study)):
        if len(complete) < _MIN_TRIALS or len({trial.values[index] for trial in complete}) < 2:
            continue

        def target(trial: FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        # From the same trials, always the same forest.
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
        rows += [(name, parameter, share) for parameter, share in found.items()]
    return pd.DataFrame(rows, columns=columns)


class _KernelLock:
    """For a journal of this machine: costs no change of a folder, and dies with its process.

    Optuna's own, by links, is for disks that machines share.
    """

    def __init__(self, journal: Path) -> None:
        self._lock = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class _Numbered(BaseSampler):  # type: ignore[misc]
    """TPE whose random numbers hang on the trial's number.

    So one process searches the same trials again from the same seed, and several processes, on
    whatever machine, never draw each other's.
    """

    def __init__(self, seed: int, num_startup_trials: int) -> None:
        self._seed, self._num_startup_trials = seed, num_startup_trials
        self._inner = self._make(0)

    def _make(self, number: int) -> TPESampler:
        seed = (self._seed << 20) + number
        return TPESampler(seed=seed % (1 << 32), n_startup_trials=self._num_startup_trials)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = self._make(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self._inner.infer_relative_search_space(study, trial))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return dict(self._inner.sample_relative(study, trial, search_space))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, name, distribution)


def _any_complete(study: optuna.Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _open(storage: str) -> BaseStorage:
    if "://" not in storage:
        path = Path(storage)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _KernelLock(path) if path.name == _OWN_JOURNAL else None
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    wait = {"timeout": _SQLITE_SECONDS} if _url(storage).drivername.startswith("sqlite") else {}
    return RDBStorage(storage, engine_kwargs={"connect_args": wait})


def _url(storage: str) -> Any:
    try:
        return make_url(storage)
    except SQLAlchemyError as error:
        raise XsdError("--storage is no SQLAlchemy URL, such as postgresql://host/base") from error


def _shown(storage: str) -> str:
    """Without its password."""
    return str(_url(storage).render_as_string(hide_password=True)) if "://" in storage else storage


def _pruner(config: SearchConfig, num_epochs: int) -> optuna.pruners.BasePruner:
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource=num_epochs)
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=config.num_startup_trials, n_warmup_steps=max(1, num_epochs // 5)
        )
    return optuna.pruners.NopPruner()
