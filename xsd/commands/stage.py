"""What every stage does around its own work: find its inputs, be reused, or run and keep.

A stage module has ``perform(config) -> Product``; ``run(config)`` calls it and throws the product
away. A stage that lacks an input calls the ``perform`` of the stage before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.errors import XsdError
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run


@dataclass(frozen=True)
class StageConfig:
    """What all stages have."""

    rerun: bool = False
    """Run even if a finished run with the same key is there."""
    recipe: Path | None = None
    """Recipe by which missing inputs are made; --config gives it too."""


def perform(
    stage: str,
    config: Any,
    *,
    resolve: Callable[[], Mapping[str, Product]],
    rooms: Sequence[str],
    work: Callable[[Run, Mapping[str, Product]], None],
    tags: Mapping[str, object] | None = None,
) -> Product:
    """Reuse a finished run of this stage with the same key, or make one.

    Args:
        config: the stage's dataclass, with ``pair`` and ``rerun``.
        resolve: finds (or makes) the inputs, by role.
        rooms: the source that decides the product; part of the key.
        work: does it, logging into the run.
    """
    from xsd.tracking import products, records, reuse
    from xsd.tracking.run import active, connect, stage_run

    values = _values(config)
    if (folder := records.root()) is not None:
        inputs = resolve()
        key = stage_key(stage, config, inputs, rooms)
        with records.record(folder, stage, config.pair, values, inputs, tags, key) as noted:
            work(noted, inputs)
        return records.product(noted.path)
    with ExitStack() as stack:

        def open_run() -> Run:
            return stack.enter_context(stage_run(stage, config.pair, values, tags=tags))

        # ``mlflow run`` has begun a run that is ours: inputs made on the way are its children.
        run = open_run() if "MLFLOW_RUN_ID" in os.environ else None
        inputs = resolve()
        key = stage_key(stage, config, inputs, rooms)
        found = None if config.rerun else reuse.find_finished(key)
        if found is not None:
            if run is not None:
                run.tag({"xsd.reused": found.uri})
            return found
        run = run or open_run()
        connect(run, inputs, key)
        work(run, inputs)
    if run.outbox.has_undelivered:
        raise XsdError(
            f"the tracking server went away; run {run.run_id} is finished and kept in"
            f" {run.outbox.folder}; the next run, or xsd deliver, sends it"
        )
    if active() is None:
        print(f"run:    {run.link()}")
    return products.from_run(run.client.get_run(run.run_id))


def stage_key(stage: str, config: Any, inputs: Mapping[str, Product], rooms: Sequence[str]) -> str:
    """Everything that decides what ``perform`` would give."""
    from xsd.tracking import reuse

    return reuse.stage_key(stage, _values(config), inputs, rooms)


def _values(config: Any) -> dict[str, Any]:
    from xsd.config import resolved

    return {
        name: value for name, value in resolved(config).items() if name not in ("rerun", "recipe")
    }


def upstream(
    stage: str,
    given: str | None,
    config: Any,
    filters: Mapping[str, object] | None = None,
    **overrides: Any,
) -> Product:
    """The product of an earlier stage: the one given, else the newest of this pair, else a new one.

    Args:
        given: path, ``runs:/...`` or ``models:/...``; None: look for it.
        config: the asking stage's configuration; fields of the same name are passed on.
        filters: tags or ``cfg.`` values that a finished run must have (``newest_finished``).
        overrides: fields of the earlier stage's configuration.
    """
    from xsd.tracking import products, records, reuse

    if given is not None:
        return products.load(given, {"pair": config.pair})
    if (folder := records.root()) is not None:
        return records.newest(folder, stage, config.pair, filters or {})
    found = reuse.newest_finished(stage, config.pair, filters)
    if found is not None and not reuse.damage(found):
        print(f"{stage}: takes {found.uri}")
        return found
    return make(stage, config, **overrides)


def make(stage: str, config: Any, **overrides: Any) -> Product:
    """Perform another stage by the asking one's recipe, its shared fields, and ``overrides``."""
    module = import_module(f"xsd.commands.{stage}")
    shared = ("seed", *(field.name for field in fields(PairConfig)))
    names = {field.name for field in fields(module.Config)}
    values = {
        name: getattr(config, name) for name in shared if name in names and hasattr(config, name)
    }
    product: Product = module.perform(settings(stage, config.recipe, **{**values, **overrides}))
    return product


def settings(stage: str, recipe: Path | None, **values: Any) -> Any:
    """A stage's configuration: defaults, the recipe's section for it, and values (None: not given).

    Raises:
        XsdError: the recipe or a value is refused.
    """
    from xsd.cli import section_class
    from xsd.config import parse

    flags = [] if recipe is None else ["--config", str(recipe)]
    for name, value in values.items():
        flags += [] if value is None else [f"--{name}", str(value)]
    config_class = import_module(f"xsd.commands.{stage}").Config
    return parse(config_class, flags, prog=f"xsd {stage}", sections=section_class)
