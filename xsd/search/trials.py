"""Trials: claimed one by one, so that any number of processes can work on one study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from xsd.errors import XsdError
from xsd.search.space import Space
from xsd.search.study import counted, leads, objectives
from xsd.types import EpochReport

_POLL_SECONDS: Final = 0.5
_UNCLAIMED_SECONDS: Final = 10.0
"""A trial that was asked for is claimed at once, or never."""


@dataclass
class Trial:
    """What is to be tried."""

    number: int
    params: Mapping[str, Any]
    _study: optuna.Study
    run: str = ""
    """URI of what it leaves: set by the objective, and kept by the study. Where a process died in
    the trial, what that one left of it."""

    def leads(self, values: Mapping[str, float]) -> bool:
        """Whether no completed trial is as good in every objective."""
        return leads(self._study, values)


Objective = Callable[[Trial], Generator[EpochReport, None, Mapping[str, float]]]
"""A trial -> the reports of its epochs, as ``learning.fit`` yields them; in the end, what was
measured for the objectives beside the accept length."""


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What became of one trial."""

    number: int
    params: Mapping[str, Any]
    state: Literal["complete", "pruned", "failed"]
    accept_length: float | None
    """Best of its epochs; None if there was none."""
    num_epochs: int
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class Claims:
    """How a process tells its trials from others', and the living from the dead."""

    process: str
    """Name of this process, unique among machines."""
    is_gone: Callable[[str], bool]
    """Whether a process of this machine has ended; False for those of others."""
    stale_seconds: float
    """After so long without a report, a process of another machine is taken for dead."""
    lock: Callable[[], AbstractContextManager[None]]
    """Held against the other processes of this machine."""


def run_trials(
    objective: Objective,
    study: optuna.Study,
    space: Space,
    claims: Claims,
    *,
    metric: str,
    num_trials: int,
) -> Iterator[TrialReport]:
    """Run trials until the study has ``num_trials``, and report each when it ends.

    Others may work on the study meanwhile: this ends when all trials have ended, theirs included.
    A trial whose objective raises ``XsdError`` (a loss that is not finite, sizes that do not fit)
    has failed, and the search goes on. One whose process died or was stopped is gone on with on
    its machine, and replaced on others.

    Args:
        metric: key of ``EpochReport.val`` that is the accept length.
    """
    while True:
        _bury(study, claims)
        trial = _take_over(study, claims)
        trials = counted(study)
        if trial is None and len(trials) < num_trials:
            trial = _claim(study, space, claims, num_trials)
        if trial is not None:
            yield _run(objective, study, trial, metric)
        elif any(trial.state is TrialState.RUNNING for trial in trials):
            time.sleep(_POLL_SECONDS)
        elif len(trials) >= num_trials:
            return


def _bury(study: optuna.Study, claims: Claims) -> None:
    """Tell trials lost that nobody here can go on with: never claimed, or of a machine that was
    not heard of for long."""
    now = time.time()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get("process")
        began = trial.datetime_start.timestamp() if trial.datetime_start else now
        silent = now - trial.user_attrs.get("progress", {}).get("seen", began)
        # Killed between asking and claiming: nobody else would know whose it is.
        patience = min(_UNCLAIMED_SECONDS if process is None else math.inf, claims.stale_seconds)
        if silent > patience and not (process and _is_left(trial, claims)):
            _tell_lost(study, trial)


def _is_left(trial: FrozenTrial, claims: Claims) -> bool:
    """Whether it was begun on this machine, by a process that works on it no more."""
    process = trial.user_attrs.get("process")
    # This one asks for a trial only when it has none.
    return process is not None and (process == claims.process or claims.is_gone(process))


def _take_over(study: optuna.Study, claims: Claims) -> optuna.Trial | None:
    """A trial that is left, under its number; None: there is none."""

    def left() -> FrozenTrial | None:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return next((trial for trial in running if _is_left(trial, claims)), None)

    if left() is None:
        return None
    with claims.lock():
        found = left()
        if found is None:
            return None
        trial = optuna.Trial(study, found._trial_id)
        earlier = found.user_attrs.get("progress", {})
        trial.set_user_attr("progress", {**earlier, "seen": time.time()})
        trial.set_user_attr("process", claims.process)
    return trial


def _tell_lost(study: optuna.Study, trial: FrozenTrial) -> None:
    # Another process may have come first.
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _claim(
    study: optuna.Study, space: Space, claims: Claims, num_trials: int
) -> optuna.Trial | None:
    """Ask for a trial; None: others asked for the last ones at the same time."""
    trial = study.ask(fixed_distributions=dict(space))
    try:
        trial.set_user_attr("process", claims.process)
    except optuna.exceptions.UpdateFinishedTrialError:
        # So slow that others took it for one that nobody would claim.
        return None
    earlier = sum(other.number < trial.number for other in counted(study))
    if earlier < num_trials:
        return trial
    study.tell(trial, state=TrialState.FAIL)
    return None


def _run(
    objective: Objective, study: optuna.Study, trial: optuna.Trial, metric: str
) -> TrialReport:
    begun = trial.user_attrs.get("progress", {})
    tried = Trial(trial.number, trial.params, study, run=begun.get("run", ""))
    judged = _judged(study, trial)
    reports = objective(tried)
    best, num_epochs, reason = -math.inf, 0, ""
    state = TrialState.COMPLETE
    values: list[float] | None = None
    try:
        while True:
            try:
                report = next(reports)
            except StopIteration as ended:
                measured = {"accept_length": best, **ended.value}
                values = [measured[name] for name in objectives(study)]
                break
            num_epochs += 1
            # The kept checkpoint is the best epoch's, so a trial is judged by its best so far.
            best = max(report.val[metric], best)
            _note_progress(trial, tried, num_epochs)
            if num_epochs >= judged and _falls_behind(study, trial, best, num_epochs, judged):
                state = TrialState.PRUNED
                break
        if num_epochs == 0:
            raise XsdError("it reported no epoch")
    except XsdError as error:
        state, values, reason = TrialState.FAIL, None, str(error)
        trial.set_user_attr("reason", reason)
        _note_progress(trial, tried, num_epochs)
    except Exception:
        study.tell(trial, state=TrialState.FAIL)
        raise
    finally:
        reports.close()
    study.tell(trial, values, state=state, skip_if_finished=True)
    return TrialReport(
        number=trial.number,
        params=trial.params,
        state={TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(state, "failed"),  # type: ignore[arg-type]
        accept_length=best if num_epochs else None,
        num_epochs=num_epochs,
        reason=reason,
    )


def _note_progress(trial: optuna.Trial, tried: Trial, num_epochs: int) -> None:
    """In one go: processes that share a study wait for its storage."""
    progress = {"num_epochs": num_epochs, "seen": time.time(), "run": tried.run}
    trial.set_user_attr("progress", progress)


def _judged(study: optuna.Study, trial: optuna.Trial) -> int:
    """Epochs that were reported before; a process that died after the last may not have judged."""
    frozen = study.get_trials(deepcopy=False)[trial.number]
    return max(frozen.intermediate_values, default=0)


def _falls_behind(
    study: optuna.Study, trial: optuna.Trial, best: float, num_epochs: int, judged: int
) -> bool:
    """Report an epoch; with several objectives there is no order, and nothing is pruned."""
    if len(study.directions) > 1:
        return False
    if num_epochs > judged:
        trial.report(best, step=num_epochs)
    return bool(trial.should_prune())
