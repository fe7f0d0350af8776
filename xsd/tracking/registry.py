"""The model registry: one registered model a pair and level, its best version behind an alias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xsd.errors import XsdError
from xsd.tracking import store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION: Final = "champion"
PREVIOUS: Final = "previous_champion"


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
    from mlflow.exceptions import MlflowException

    try:
        return store.client().get_model_version_by_alias(model_name(pair, level), CHAMPION)
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
        with store.lock(name):
            current = champion(pair, level)
            if (current and current.version) == (incumbent and incumbent.version):
                version = _register(name, model_id, {**model.tags, **tags}, model.source_run_id)
                _move(name, version, current)
                return Promotion(name, version, promoted=True, reasons=())


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
    kept = {key: str(value) for key, value in tags.items() if not key.startswith("mlflow.")}
    version = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        tags={**kept, "source_run": str(run_id)},
    )
    return int(version.version)


def _move(name: str, version: int, previous: ModelVersion | None) -> None:
    client = store.client()
    if previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, previous.version)
    client.set_registered_model_alias(name, CHAMPION, str(version))
