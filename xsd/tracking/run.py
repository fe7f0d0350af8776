"""One stage, one run: begun, fed, and ended with the status that it deserves.

``mlflow run`` begins a run before our code starts; the first stage of the process joins it. Every
further stage becomes a child of the run that is active, or of the parent it is told.
"""

from __future__ import annotations

import contextvars
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Final

from xsd.tracking import spool, store, system, writes
from xsd.tracking.credentials import redacted, redactor
from xsd.tracking.open_run import Run, as_tags
from xsd.tracking.products import maker

if TYPE_CHECKING:
    from mlflow.entities import RunInfo
    from mlflow.tracking import MlflowClient

    from xsd.tracking.products import Product

__all__ = ["Run", "Terminated", "active", "connect", "join", "reap", "stage_run"]

_PATIENCE_SECONDS: Final = 1800.0
_POLL_SECONDS: Final = 5.0

_active: contextvars.ContextVar[Run | None] = contextvars.ContextVar("xsd_run", default=None)


class Terminated(SystemExit):
    """SIGTERM, as an exception, so that the run can be ended properly on the way out."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def active() -> Run | None:
    """The innermost open run of this thread."""
    return _active.get()


@contextmanager
def stage_run(
    stage: str,
    pair: str,
    config: Mapping[str, object],
    *,
    inputs: Mapping[str, Product] | None = None,
    tags: Mapping[str, object] | None = None,
    name: str | None = None,
    key: str | None = None,
    parent: str | None = None,
    killed_by: tuple[type[BaseException], ...] = (),
) -> Iterator[Run]:
    """Open the run of a stage in experiment ``xsd/<pair>``; on leaving, end it.

    Args:
        config: ``config.resolved(...)``; logged under ``cfg.``.
        inputs: role -> what was read; tagged ``input.<role>`` and ``digest.<role>``, and linked.
        key: the stage key (``reuse.stage_key``), by which a later run finds this one.
        parent: run id of the parent; needed in threads, else the active run is taken.
        killed_by: exceptions that end the run as KILLED, as a pruned trial does.

    Status: FINISHED; FAILED on an exception; KILLED on Ctrl-C, SIGTERM, or ``killed_by``.

    Raises:
        XsdError: the tracking server does not answer.
    """
    inputs = _traced(inputs)
    told = {**_context_tags(stage, pair), **_input_tags(inputs), **(tags or {})}
    run = _open(stage, pair, parent, name or _run_name(stage, tags), told)
    token = _active.set(run)
    status = "FAILED"
    killing: tuple[type[BaseException], ...] = (
        KeyboardInterrupt,
        SystemExit,
        GeneratorExit,
        *killed_by,
    )
    try:
        with _terminating(), system.watched(run):
            run.params(config)
            _link(run, inputs)
            yield run
            run.finish_manifest()
        # Set last: a run found by its key is complete.
        run.tag({"xsd.key": run.key or key})
        status = "FINISHED"
    except killing:
        status = "KILLED"
        raise
    except BaseException as error:
        run.tag({"xsd.error": redacted(" ".join(str(error).split()))[:500]})
        raise
    finally:
        _active.reset(token)
        run.end(status)


def join(run_id: str) -> None:
    """Make this process's stages children of a run that another process holds open."""
    client = store.client()
    run = client.get_run(run_id)
    info, tags = run.info, run.data.tags
    _active.set(
        Run(client, run_id, info.experiment_id, tags["stage"], tags["pair"], info.artifact_uri)
    )


def connect(run: Run, inputs: Mapping[str, Product], key: str) -> None:
    """Tell an open run what it reads, where that became known only after it was opened."""
    run.key = key
    traced = _traced(inputs)
    run.tag(_input_tags(traced))
    _link(run, traced)
    run.flush()


def _open(stage: str, pair: str, parent: str | None, name: str, told: Mapping[str, object]) -> Run:
    client = store.client()
    joined = os.environ.pop("MLFLOW_RUN_ID", None)
    outer = active()
    if joined:
        info = client.get_run(joined).info
        told = {**told, "mlflow.runName": name}
    else:
        parent = parent or (outer.run_id if outer else None)
        if outer and parent == outer.run_id:
            experiment = outer.experiment_id
        elif parent:
            experiment = client.get_run(parent).info.experiment_id
        else:
            spool.deliver_pending(client)
            experiment = store.experiment_id(pair)
            reap(client, experiment)
        own = {"mlflow.user": store.user(), "mlflow.parentRunId": parent}
        tags = as_tags({**own, **told})
        info = _create(client, experiment, tags, name, within=outer is not None)
    run = Run(client, info.run_id, info.experiment_id, stage, pair, info.artifact_uri)
    if joined:
        _hide_what_was_launched(client, info.run_id)
        run.tag(told)
        run.flush()
    return run


def _hide_what_was_launched(client: MlflowClient, run_id: str) -> None:
    """``mlflow run`` keeps its command line before our code starts: tags can be written over,
    params cannot."""
    data, hide = client.get_run(run_id).data, redactor()
    for name, value in data.tags.items():
        if hide(value) != value:
            client.set_tag(run_id, name, hide(value))
    shown = sorted(name for name, value in data.params.items() if hide(value) != value)
    if shown:
        print(
            f"warning: mlflow kept a credential as param {', '.join(shown)} of run {run_id}, where"
            " it cannot be changed; give it by the environment instead, delete that run"
            " (mlflow runs delete, mlflow gc) and change the credential",
            file=sys.stderr,
        )


def _create(
    client: MlflowClient, experiment: str, tags: dict[str, str], name: str, *, within: bool
) -> RunInfo:
    """Make a run; within another one, wait for a server that went away meanwhile."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return client.create_run(experiment, tags=tags, run_name=name).info
        except Exception as error:
            if not within or time.monotonic() > deadline or not store.is_outage(error):
                raise
            print(f"{name}: waits for the tracking server", file=sys.stderr)
            time.sleep(_POLL_SECONDS)


def reap(client: MlflowClient, experiment_id: str) -> None:
    """End, as KILLED, the runs of this host whose process is gone without having ended them."""
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=200)
    for run in running:
        process = run.data.tags.get("xsd.process")
        if process and store.is_gone(process):
            client.set_terminated(run.info.run_id, "KILLED")


def _run_name(stage: str, tags: Mapping[str, object] | None) -> str:
    level = (tags or {}).get("level")
    return f"{stage} {level}" if level else stage


def _context_tags(stage: str, pair: str) -> dict[str, object]:
    return {
        "stage": stage,
        "pair": pair,
        "mlflow.source.name": f"xsd {stage}",
        "mlflow.source.git.commit": store.git_commit(),
        "xsd.environment": store.environment(),
        "xsd.process": store.this_process(),
    }


def _traced(inputs: Mapping[str, Product] | None) -> dict[str, Product]:
    """With the runs that made what was given by a path, where the store knows one."""
    found = dict(inputs or {})
    for role, product in found.items():
        if product.run_id is None and ":/" not in product.uri:
            try:
                found[role] = replace(product, run_id=maker(product.digest))
            except Exception as error:
                # A link is not worth a run: the server may be back for what the run writes.
                if not store.is_outage(error):
                    raise
    return found


def _input_tags(inputs: Mapping[str, Product] | None) -> dict[str, object]:
    tags: dict[str, object] = {}
    for role, product in (inputs or {}).items():
        # MLflow admits few characters in a tag's name: the role of X1+E3 has none of them.
        name = re.sub(r"[^\w\-. :/]", "_", role)
        tags[f"input.{name}"] = product.uri
        tags[f"digest.{name}"] = product.digest
        # An alias moves: what it stood for stays known.
        tags[f"model.{name}"] = product.model_id
        # A path does not say which run made what lies there.
        tags[f"run.{name}"] = product.run_id if ":/" not in product.uri else None
    return tags


def _link(run: Run, inputs: Mapping[str, Product] | None) -> None:
    """In the UI's own fields; by its data sets' names ``lineage.down`` finds who read a run."""
    for role, product in (inputs or {}).items():
        if product.run_id:
            run.dataset(f"{role} {product.run_id}", product.digest, product.uri, "input")
    models = [product.model_id for product in (inputs or {}).values() if product.model_id]
    if models:
        run.outbox.send(writes.models_read(models))


@contextmanager
def _terminating() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated`` for the block, where nobody else handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def raise_terminated(signum: int, frame: FrameType | None) -> None:
        print("terminated", file=sys.stderr)
        raise Terminated

    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
