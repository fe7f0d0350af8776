"""The model registry: one registered model a pair and level, its best version behind an alias.

An alias moves by a plain update, without compare-and-swap. So whoever moves one holds the model's
lock, and looks again at what stands behind it before it moves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from xsd.errors import XsdError
from xsd.tracking import store
from xsd.tracking.credentials import redacted

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION: Final = "champion"
PREVIOUS: Final = "previous_champion"
_VERSIONS: Final = "mlflow.modelVersions"
_LOCK_SECONDS: Final = 120.0
_STALE_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Promotion:
    """What became of a candidate."""

    name: str
    version: int | None
    """The version that now stands behind the alias; None: there is none yet."""
    promoted: bool
    reasons: tuple[str, ...]
    """Why it was refused; empty if it was not."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{CHAMPION}"


Gate = Callable[["ModelVersion | None"], Sequence[str]]
"""Incumbent -> reasons against the candidate. The incumbent's tags hold its metric and run."""


def model_name(pair: str, level: str) -> str:
    return f"xsd-{pair}-{level}"


def champion_uri(pair: str, level: str) -> str:
    return f"models:/{model_name(pair, level)}@{CHAMPION}"


def champion(pair: str, level: str) -> ModelVersion | None:
    """The version behind alias ``champion``, if there is one."""
    return _alias(model_name(pair, level), CHAMPION)


def _alias(name: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return store.client().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # An alias that is not set is an invalid parameter to MLflow, a model that is not, absent.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def promote(
    pair: str, level: str, model_id: str, gate: Gate, tags: Mapping[str, object]
) -> Promotion:
    """Register a logged model and move ``champion`` to it, if the gate has nothing against it.

    The gate may take minutes and runs unlocked; if the alias moved meanwhile, it is asked again
    about the new incumbent. ``previous_champion`` keeps the way back.

    Args:
        level: the level, or level and variant: ``L4-free`` serves another mode than ``L4``.
        model_id: from ``Run.log_model``; its sha256 tags go to the version.
        tags: metric, dataset_digest, conditioning and the like, of the candidate.

    Raises:
        XsdError: the model is of another pair or level.
    """
    name = model_name(pair, level)
    model = store.client().get_logged_model(model_id)
    for key, value in (("pair", pair), ("level", level.partition("-")[0])):
        if model.tags.get(key, value) != value:
            raise XsdError(f"model {model_id}: {key} is {model.tags[key]!r}, not {value!r}")
    while True:
        incumbent = champion(pair, level)
        if incumbent is not None and _model_id(incumbent) == model_id:
            return Promotion(name, int(incumbent.version), promoted=False, reasons=())
        if reasons := tuple(gate(incumbent)):
            version = int(incumbent.version) if incumbent else None
            return Promotion(name, version, promoted=False, reasons=reasons)
        with _lock(name):
            current = champion(pair, level)
            if (current and current.version) == (incumbent and incumbent.version):
                version = _register(name, model_id, {**model.tags, **tags}, model.source_run_id)
                _move(name, version, current)
                return Promotion(name, version, promoted=True, reasons=())


def rollback(name: str) -> Promotion:
    """Put the champion before this one back in its place; what it replaces is the way back.

    Raises:
        XsdError: there is no champion, or none before it.
    """
    with _lock(name):
        current, previous = _alias(name, CHAMPION), _alias(name, PREVIOUS)
        if current is None or previous is None:
            raise XsdError(f"{name}: has no {PREVIOUS} to go back to; xsd registry lists them")
        _move(name, int(previous.version), current)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        store.client().set_model_version_tag(name, current.version, "rolled_back", now)
    return Promotion(name, int(previous.version), promoted=True, reasons=())


def refusals(name: str) -> list[tuple[str, str, str]]:
    """Candidates that the gate refused, the newest first: promote run, candidate, reasons."""
    runs = store.client().search_runs(
        store.experiment_ids(),
        f"tags.stage = 'promote' AND tags.champion = 'models:/{name}@{CHAMPION}'"
        " AND tags.promoted = 'false'",
    )
    tags = [(run.info.run_id, run.data.tags) for run in runs]
    return [
        (run, tag.get("input.candidate", ""), tag["reasons"])
        for run, tag in tags
        if "reasons" in tag
    ]


def versions(pair: str | None = None) -> list[ModelVersion]:
    """All versions of xsd's models, newest first; for listing."""
    client = store.client()
    prefix = f"xsd-{pair}-" if pair else "xsd-"
    # A search leaves the aliases out; a version asked for by itself has them.
    found = [
        client.get_model_version(version.name, version.version)
        for version in client.search_model_versions(f"name LIKE '{prefix}%'")
    ]
    return sorted(found, key=lambda version: (version.name, -int(version.version)))


def _model_id(version: ModelVersion) -> str:
    return str(version.model_id or version.source.removeprefix("models:/"))


def _register(name: str, model_id: str, tags: Mapping[str, object], run_id: str | None) -> int:
    from mlflow.exceptions import MlflowException

    client = store.client()
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    kept = {
        key: redacted(str(value)) for key, value in tags.items() if not key.startswith("mlflow.")
    }
    version = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        tags={**kept, "source_run": str(run_id)},
    )
    # By this tag the UI leads from the model to its versions.
    model = client.get_logged_model(model_id)
    known = json.loads(model.tags.get(_VERSIONS, "[]"))
    known.append({"name": name, "version": version.version})
    client.set_logged_model_tags(model_id, {_VERSIONS: json.dumps(known)})
    return int(version.version)


def _move(name: str, version: int, previous: ModelVersion | None) -> None:
    client = store.client()
    if previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, previous.version)
    client.set_registered_model_alias(name, CHAMPION, str(version))


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Hold a model against other processes of this machine, and of others that use the server."""
    with store.lock(name):
        if store.tracking_uri().startswith("sqlite:"):
            yield
            return
        with _server_lock(name):
            yield


@contextmanager
def _server_lock(name: str) -> Iterator[None]:
    """A lock that is a registered model: of two who make one of a name, the store refuses one.

    A holder that is gone, or that has had for a minute what takes a moment, has lost it.

    Raises:
        XsdError: others hold it for too long.
    """
    from mlflow.exceptions import MlflowException

    client, lock, me = store.client(), f"{name}.lock", store.this_process()
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            client.create_registered_model(lock, tags={"process": me})
            break
        except MlflowException as error:
            # Held; or the store met others at work (it may miss a model that was just released).
            is_late = time.monotonic() > deadline
            if is_late and error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if is_late:
            raise XsdError(f"{lock}: held by another machine; delete that model if it is gone")
        _break_if_stale(lock)
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        # Whoever was too slow has lost it already.
        with suppress(MlflowException):
            client.delete_registered_model(lock)


def _break_if_stale(lock: str) -> None:
    from mlflow.exceptions import MlflowException

    client = store.client()
    try:
        held = client.get_registered_model(lock)
        age = time.time() - held.creation_timestamp / 1000
        if store.is_gone(held.tags["process"]) or age > _STALE_SECONDS:
            client.delete_registered_model(lock)
    except (MlflowException, KeyError):
        return  # released, or broken by another
