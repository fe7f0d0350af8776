"""Where a product came from, and what was made of it: the graph that the runs' tags describe.

Upwards a run names its sources by ``input.<role>``, by ``model.<role>`` the logged model that an
alias stood for at the time, and by ``run.<role>`` the run whose files lay at a path. Downwards
every source is a data set ``<role> <run id>`` of the run that read it, so that one search finds who
used a run, whatever the roles were. Nothing is opened or hashed on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from xsd.errors import XsdError
from xsd.tracking import store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

Direction = Literal["up", "down", "both"]
_RUN_ID: Final = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True)
class Node:
    """One product in the tree."""

    role: str
    """What it was to the node above it; empty at the root."""
    uri: str
    stage: str = ""
    run_id: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    """What is wrong with it (missing, deleted, failed), or that it is shown above."""
    children: tuple[Node, ...] = ()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """This node and all below, each with its depth."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


def find(name: str) -> str:
    """A run's id in full, or its first letters, as ``runs:/<id>``; other names as they are.

    Raises:
        XsdError: several runs begin so, or none does.
    """
    if not _RUN_ID.fullmatch(name) or Path(name).exists():
        return name
    found = _search(f"attributes.run_id LIKE '{name}%'", limit=5)
    if not found:
        raise XsdError(
            f"no run begins with {name!r}; give a run id, runs:/<id>, models:/... or path"
        )
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise XsdError(f"several runs begin with {name!r}: {ids}")
    return f"runs:/{found[0].info.run_id}"


def up(
    uri: str, role: str = "", model_id: str = "", made_by: str = "", seen: set[str] | None = None
) -> Node:
    """The sources of a product, down to files that no run is known for."""
    seen = set() if seen is None else seen
    run, note = _origin(uri, model_id, made_by)
    if run is None:
        return Node(role, uri, note=note)
    return _above(run, uri, role, note, seen)


def down(run_id: str, role: str = "", seen: set[str] | None = None) -> Node:
    """What was made of a run: runs that read it, and model versions registered from it."""
    run = get(run_id)
    if run is None:
        return Node(role, f"runs:/{run_id}", note="missing: no such run")
    return _below(run, role, set() if seen is None else seen)


def run_of(uri: str) -> str | None:
    """The id of the run that made a product; None: none is known."""
    run, _ = _origin(uri)
    return str(run.info.run_id) if run else None


def _above(run: Run, uri: str, role: str, note: str, seen: set[str]) -> Node:
    tags, run_id = run.data.tags, str(run.info.run_id)
    if run_id in seen:
        return _node(run, uri, role, "shown above", ())
    seen.add(run_id)
    children = tuple(
        up(value, one, tags.get(f"model.{one}", ""), tags.get(f"run.{one}", ""), seen)
        for name, value in sorted(tags.items())
        if name.startswith("input.") and (one := name.removeprefix("input."))
    )
    return _node(run, uri, role, note, children)


def _below(run: Run, role: str, seen: set[str]) -> Node:
    run_id = str(run.info.run_id)
    uri = f"runs:/{run_id}"
    if run_id in seen:
        return _node(run, uri, role, "shown above", ())
    seen.add(run_id)
    users = _search(f"dataset.name LIKE '% {run_id}'")
    children = [_below(user, _role_of(run_id, user), seen) for user in users]
    versions = [Node("registered", _version_uri(v), "model") for v in _versions(run_id)]
    return _node(run, uri, role, _state(run), (*versions, *children))


def _node(run: Run, uri: str, role: str, note: str, children: tuple[Node, ...]) -> Node:
    tags = run.data.tags
    # A run of another project has no stage: its name says what it is.
    stage = tags.get("stage") or str(run.info.run_name)
    return Node(role, uri, stage, run.info.run_id, tags, run.data.params, note, children)


def _role_of(run_id: str, user: Run) -> str:
    """As what a run was used."""
    names = [given.dataset.name for given in user.inputs.dataset_inputs]
    return ", ".join(
        sorted(f"as {name.removesuffix(run_id).strip()}" for name in names if run_id in name)
    )


def _origin(uri: str, model_id: str = "", made_by: str = "") -> tuple[Run | None, str]:
    """The run behind a URI, and what is wrong; ``model_id`` wins over an alias that may move, and
    ``made_by`` is the run that a path's files came from."""
    from mlflow.exceptions import MlflowException

    if uri.startswith("runs:/"):
        run_id = uri.removeprefix("runs:/").strip("/").partition("/")[0]
    elif uri.startswith("models:/"):
        try:
            run_id = _source_run(uri, model_id)
        except MlflowException:
            return None, "missing: no such model"
    elif made_by:
        run_id = made_by
    else:
        exists = "://" in uri or Path(uri).exists()
        return None, "" if exists else "missing: no such file here"
    run = get(run_id)
    return run, "missing: no such run" if run is None else _state(run)


def _source_run(uri: str, model_id: str) -> str:
    from xsd.tracking.products import logged_model

    client = store.client()
    if model_id:
        return str(client.get_logged_model(model_id).source_run_id)
    return str(logged_model(uri.removeprefix("models:/"))[0].source_run_id)


def get(run_id: str) -> Run | None:
    """A run, deleted or not; None: the store has none of that id."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client().get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _state(run: Run) -> str:
    if run.info.lifecycle_stage == "deleted":
        return "deleted"
    return "" if run.info.status == "FINISHED" else str(run.info.status).lower()


def _search(condition: str, limit: int | None = None) -> list[Run]:
    """Runs, deleted ones too, the oldest first."""
    from mlflow.entities import ViewType

    client, found, token = store.client(), [], None
    experiments = [
        str(one.experiment_id) for one in client.search_experiments(view_type=ViewType.ALL)
    ]
    while True:
        page = client.search_runs(
            experiments,
            condition,
            run_view_type=ViewType.ALL,
            max_results=limit or 1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        found += page
        token = page.token
        if not token or limit:
            return found


def _versions(run_id: str) -> list[ModelVersion]:
    return list(store.client().search_model_versions(f"run_id = '{run_id}'"))


def _version_uri(version: ModelVersion) -> str:
    # A search leaves the aliases out; a version asked for by itself has them.
    aliases = store.client().get_model_version(version.name, version.version).aliases
    return f"models:/{version.name}/{version.version}" + "".join(f" @{one}" for one in aliases)
