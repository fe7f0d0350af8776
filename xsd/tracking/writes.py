"""What a run writes, as records of plain values: sent at once or later, by the same code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xsd.files import sha256_file
from xsd.tracking.artifacts import local_folder, place

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

Write = Mapping[str, Any]
"""``kind``, and the arguments of what below has its name. JSON can hold it."""

PointOfCurve = tuple[str, float, int, int, str | None]
"""Key, value, timestamp in ms, step, and the logged model that it is of."""

BATCH: Final = 1000
_PARAMS_BATCH: Final = 100


def batch(
    metrics: Sequence[PointOfCurve] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Write:
    return {"kind": "batch", "metrics": list(metrics), "params": params or {}, "tags": tags or {}}


def artifact(path: Path, folder: str | None) -> Write:
    return {"kind": "artifact", "files": [str(path)], "folder": folder}


def dataset(name: str, digest: str, source: str, context: str) -> Write:
    return {"kind": "dataset", "name": name, "digest": digest, "source": source, "context": context}


def models_read(model_ids: Sequence[str]) -> Write:
    """Logged models as inputs of the run."""
    return {"kind": "models_read", "model_ids": list(model_ids)}


def model(
    experiment_id: str,
    name: str,
    files: Sequence[Path],
    params: Mapping[str, str],
    tags: Mapping[str, str],
    metrics: Sequence[PointOfCurve],
) -> Write:
    """A logged model; its tags get the sha256 of every file."""
    digests = {f"sha256.{path.name}": sha256_file(path) for path in files}
    return {
        "kind": "model",
        "experiment_id": experiment_id,
        "name": name,
        "files": [str(path) for path in files],
        "params": params,
        "tags": {**tags, **digests},
        "metrics": list(metrics),
    }


def end(status: str, time_ms: int) -> Write:
    return {"kind": "end", "status": status, "time_ms": time_ms}


def send(client: MlflowClient, run_id: str, write: Write) -> str | None:
    """Write it to the store; twice is as good as once. Returns the id of a logged model."""
    kind = write["kind"]
    if kind == "batch":
        _send_batch(client, run_id, write)
    elif kind == "artifact":
        client.log_artifact(run_id, write["files"][0], write["folder"])
    elif kind == "dataset":
        _send_dataset(client, run_id, write)
    elif kind == "models_read":
        _send_models_read(client, run_id, write)
    elif kind == "model":
        return _send_model(client, run_id, write)
    else:
        assert kind == "end", kind
        client.set_terminated(run_id, write["status"], write["time_ms"])
    return None


def _send_batch(client: MlflowClient, run_id: str, write: Write) -> None:
    from mlflow.entities import Param, RunTag

    metrics = _points(write["metrics"])
    params = [Param(name, value) for name, value in write["params"].items()]
    tags = [RunTag(name, value) for name, value in write["tags"].items()]
    # MLflow takes a thousand at once, a hundred params and a hundred tags among them.
    most, few = BATCH - 2 * _PARAMS_BATCH, _PARAMS_BATCH
    while metrics or params or tags:
        client.log_batch(run_id, metrics[:most], params[:few], tags[:few])
        metrics, params, tags = metrics[most:], params[few:], tags[few:]


def _points(points: Sequence[Sequence[Any]], model_id: str | None = None) -> list[Metric]:
    from mlflow.entities import Metric

    return [
        Metric(key, value, at, step, model_id=model_id or of) for key, value, at, step, of in points
    ]


def _send_dataset(client: MlflowClient, run_id: str, write: Write) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": write["source"]})
    entity = Dataset(write["name"], write["digest"][:36], source_type="local", source=source)
    tags = [InputTag("mlflow.data.context", write["context"])]
    client.log_inputs(run_id, datasets=[DatasetInput(entity, tags)])


def _send_models_read(client: MlflowClient, run_id: str, write: Write) -> None:
    from mlflow.entities import LoggedModelInput

    client.log_inputs(run_id, models=[LoggedModelInput(one) for one in write["model_ids"]])


def _send_model(client: MlflowClient, run_id: str, write: Write) -> str:
    from mlflow.entities import LoggedModelOutput

    made = client.create_logged_model(
        write["experiment_id"],
        name=write["name"],
        source_run_id=run_id,
        tags=dict(write["tags"]),
        params=dict(write["params"]),
        model_type="adapter",
    )
    folder = local_folder(made.artifact_location)
    for path in map(Path, write["files"]):
        if folder is None:
            client.log_model_artifact(made.model_id, str(path))
        else:
            place(path, folder / path.name)
    client.finalize_logged_model(made.model_id, "READY")
    steps = [point[3] for point in write["metrics"]] or [0]
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, steps[0])])
    metrics = _points(write["metrics"], made.model_id)
    client.log_batch(run_id, metrics=metrics)
    client.set_tag(run_id, "xsd.model_id", made.model_id)
    return str(made.model_id)
