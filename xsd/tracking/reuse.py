"""What is finished is not done again: a stage's key, and the runs found by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import xsd
from xsd.errors import XsdError
from xsd.files import sha256_file, sha256_json
from xsd.tracking import records, store
from xsd.tracking.products import Product, altered, from_run, load

if TYPE_CHECKING:
    from mlflow.entities import Run

OUTPUTS: Final = frozenset(
    {"output_dir", "output_path", "max_failures", "num_workers", "storage", "stale_minutes"}
)
"""Configuration fields that change where and how a product is made, not what it is."""
_PACKAGES: Final = ("torch", "transformers", "numba", "numpy")
"""Of which the numbers are; numba compiles the kernels."""


def stage_key(
    stage: str,
    config: Mapping[str, object],
    inputs: Mapping[str, Product],
    rooms: Sequence[str],
) -> str:
    """Everything that decides a stage's product, as one sha256.

    Args:
        config: ``config.resolved(...)``. A field named as an input counts by the input's digest,
            not by its path.
        rooms: packages or modules of xsd whose source matters: ``["adapters", "metrics"]``.
    """
    values = {
        name: value for name, value in config.items() if name not in OUTPUTS and name not in inputs
    }
    return sha256_json(
        {
            "stage": stage,
            "config": values,
            "inputs": {role: product.digest for role, product in inputs.items()},
            "source": {room: _source_digest(room) for room in rooms},
            "versions": {name: version(name) for name in _PACKAGES},
        }
    )


def find_finished(key: str) -> Product | None:
    """The newest finished run with this key whose artifacts are whole; says so in one line."""
    if records.root() is not None:
        return None
    for run in _search(f"tags.`xsd.key` = '{key}'"):
        product = from_run(run)
        name = run.info.run_name
        harm = damage(product)
        if harm is None:
            print(f"{name}: reused run {run.info.run_id}")
            return product
        print(f"{name}: run {run.info.run_id} is not reused: {harm}")
    return None


def newest_finished(
    stage: str, pair: str, filters: Mapping[str, object] | None = None
) -> Product | None:
    """The stage's newest finished run for the pair.

    Args:
        filters: tags (``{"level": "L4"}``), or resolved configuration (``{"cfg.split": "train"}``).
    """
    conditions = [f"tags.stage = '{stage}'", f"tags.pair = '{pair}'"]
    for name, value in (filters or {}).items():
        family = "params" if name.startswith("cfg.") else "tags"
        conditions.append(f"{family}.`{name}` = '{value}'")
    found = _search(" AND ".join(conditions))
    # A run that ``mlflow run`` began and that reused another one left nothing itself.
    return next((from_run(run) for run in found if "xsd.reused" not in run.data.tags), None)


def any_finished(run_ids: Sequence[str]) -> bool:
    """Whether one of these runs (or records) ended well; one that nobody knows did not."""
    if (folder := records.root()) is not None:
        return any(records.is_finished(folder / name) for name in run_ids)
    given = ", ".join(f"'{run_id}'" for run_id in run_ids)
    return bool(_search(f"attributes.run_id IN ({given})"))


def damage(product: Product) -> str | None:
    """Why a finished run's files cannot be taken again; None: they can."""
    if not product.path.is_dir():
        return "its artifacts are gone"
    if harm := altered(product.path):
        return harm
    try:
        if product.model_id:
            load(f"models:/{product.model_id}")
    except XsdError as error:
        return str(error)
    return None


def _search(condition: str) -> list[Run]:
    """Finished runs, the newest first."""
    return list(
        store.client().search_runs(
            store.experiment_ids(),
            f"attributes.status = 'FINISHED' AND {condition}",
            order_by=["attributes.end_time DESC"],
            max_results=100,
        )
    )


def _source_digest(room: str) -> str:
    root = Path(xsd.__file__).parent / room
    module = root.with_suffix(".py")
    files = [module] if module.is_file() else sorted(root.rglob("*.py"))
    if not files:
        raise ValueError(f"xsd has no room {room!r}")
    names = {file: file.relative_to(root.parent).as_posix() for file in files}
    return sha256_json({name: sha256_file(file) for file, name in names.items()})
