"""Runs as folders, where there is no MLflow: written by the stages, logged later by ``import-run``.

``XSD_RECORDS=FOLDER`` makes every stage leave ``FOLDER/<number>_<stage>``: ``run.json`` (what it
was, with its configuration, tags and inputs), ``metrics.jsonl`` (one value a line),
``manifest.json`` and ``artifacts``. A record may lose large artifacts on its way; the manifest
still says what they were.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xsd.errors import XsdError
from xsd.files import read_json, sha256_file, sha256_json, write_json
from xsd.tracking import store
from xsd.tracking.artifacts import place
from xsd.tracking.credentials import redacted, redactor
from xsd.tracking.open_run import Run
from xsd.tracking.products import MANIFEST, Product

if TYPE_CHECKING:
    import pandas as pd

    from xsd.tracking.figures import Figure

VARIABLE: Final = "XSD_RECORDS"
_ABOUT, _METRICS, _ARTIFACTS = "run.json", "metrics.jsonl", "artifacts"


def root() -> Path | None:
    """Where this process's stages leave their records; None: MLflow keeps them."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


@dataclass
class FolderRun(Run):
    """``Run`` without a store: what is logged is appended to files."""

    path: Path = field(default_factory=Path)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        return self.path / _ARTIFACTS

    def log(self, metrics: Mapping[str, float], step: int = 0, model_id: str | None = None) -> None:
        now_ms = int(time.time() * 1000)
        with (self.path / _METRICS).open("a", encoding="utf-8") as lines:
            for name, value in metrics.items():
                key = re.sub(r"@0?\.", "_", name)
                if math.isfinite(value):
                    lines.write(json.dumps([key, float(value), now_ms, step]) + "\n")
                else:
                    self._non_finite.add(key)

    def flush(self) -> None:
        """Every value is on disk already."""

    def params(self, config: Mapping[str, object]) -> None:
        hide = redactor()
        self._keep("params", {f"cfg.{name}": hide(str(value)) for name, value in config.items()})

    def tag(self, tags: Mapping[str, object]) -> None:
        hide = redactor()
        given = {name: value for name, value in tags.items() if value is not None}
        self._keep("tags", {name: hide(str(value)) for name, value in given.items()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if not path.is_file():
            raise XsdError(f"{path}: no such file to keep as an artifact")
        name = f"{folder}/{path.name}" if folder else path.name
        place(path, self.folder / name)
        self.manifest[name] = {"sha256": sha256_file(path), "num_bytes": path.stat().st_size}
        write_json(self.path / MANIFEST, self.manifest)

    def figures(
        self,
        figures: Mapping[str, Figure],
        output_dir: Path | None = None,
        *,
        still: bool = True,
    ) -> list[Path]:
        """Left out: a figure shows what the tables hold."""
        return []

    def table(self, name: str, frame: pd.DataFrame) -> None:
        path = self.folder / "tables" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_json(path, orient="split", index=False, double_precision=6)
        self.artifact(path, "tables")

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self._keep(
            "datasets", {name: {"digest": digest, "source": redacted(source), "context": context}}
        )

    def log_model(
        self,
        name: str,
        files: Sequence[Path],
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
    ) -> str:
        """A checkpoint is among the artifacts; no model is registered from a record."""
        self.log(metrics or {}, step)
        return name

    def end(self, status: str) -> None:
        if self._non_finite:
            self.tag({"xsd.not_finite": ", ".join(sorted(self._non_finite))})
        kept = {name: at for name, at in self.manifest.items() if not name.startswith("figures/")}
        if kept:
            self.tag({"xsd.digest": sha256_json(kept)})
        self.about |= {"status": status, "end_ms": int(time.time() * 1000)}
        write_json(self.path / _ABOUT, self.about)

    def finish_manifest(self) -> None:
        """It is written with every artifact."""

    def _keep(self, kind: str, values: Mapping[str, object]) -> None:
        self.about.setdefault(kind, {}).update(values)
        write_json(self.path / _ABOUT, self.about)


@contextmanager
def record(
    folder: Path,
    stage: str,
    pair: str,
    config: Mapping[str, object],
    inputs: Mapping[str, Product],
    tags: Mapping[str, object] | None,
    key: str,
) -> Iterator[FolderRun]:
    """Open a stage's record; on leaving, end it as FINISHED, FAILED or KILLED."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _new(folder, stage, (tags or {}).get("level"))
    level = (tags or {}).get("level")
    run = FolderRun(None, path.name, pair, stage, pair, str(path), key, path=path)
    run.about = {
        "stage": stage,
        "pair": pair,
        "name": f"{stage} {level}" if level else stage,
        "key": key,
        "begin_ms": int(time.time() * 1000),
    }
    run.params(config)
    given = {f"input.{role}": product.uri for role, product in inputs.items()}
    digests = {f"digest.{role}": product.digest for role, product in inputs.items()}
    context = {"stage": stage, "pair": pair, "mlflow.source.name": f"xsd {stage}"}
    run.tag({**context, **given, **digests, **(tags or {})})
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        status = "KILLED"
        raise
    except BaseException as error:
        run.tag({"xsd.error": redacted(" ".join(str(error).split()))[:500]})
        raise
    finally:
        run.end(status)


def _new(folder: Path, stage: str, level: object) -> Path:
    """The next number's folder; processes may ask at once."""
    name = f"{stage}_{level}" if level else stage
    for number in range(1, 10_000):
        if any(folder.glob(f"{number:04}_*")):
            continue
        path = folder / f"{number:04}_{name}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise XsdError(f"{folder}: holds too many records; name another folder in {VARIABLE}")


def product(path: Path) -> Product:
    """What a finished record left, for the stages after it."""
    about = read_json(path / _ABOUT)
    tags = about.get("tags", {})
    return Product(str(path), path / _ARTIFACTS, tags.get("xsd.digest", path.name), tags=tags)


def is_finished(path: Path) -> bool:
    """Whether there is such a record, and it ended well."""
    about = path / _ABOUT
    return about.is_file() and read_json(about).get("status") == "FINISHED"


def newest(folder: Path, stage: str, pair: str, filters: Mapping[str, object]) -> Product:
    """The newest finished record of a stage.

    Raises:
        XsdError: there is none; without MLflow no stage makes another's product.
    """
    for path in sorted(folder.glob(f"*_{stage}*"), reverse=True):
        about = read_json(path / _ABOUT)
        known = {**about.get("params", {}), **about.get("tags", {})}
        fits = all(known.get(name) == str(value) for name, value in filters.items())
        if about.get("status") == "FINISHED" and about["pair"] == pair and fits:
            return product(path)
    raise XsdError(f"{folder}: no finished record of stage {stage} for pair {pair}; run it first")


# ---------------------------------------------------------------- into MLflow


def read_records(folder: Path) -> list[Path]:
    """Records below a folder, in order.

    Raises:
        XsdError: none, or one that is damaged.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{_ABOUT}"))
    if not found:
        raise XsdError(f"{folder}: holds no records; name the folder that {VARIABLE} named")
    for path in found:
        about = read_json(path / _ABOUT)
        lacking = {"stage", "pair", "name", "begin_ms"} - set(about)
        if lacking or about.get("status") not in ("FINISHED", "FAILED", "KILLED"):
            raise XsdError(f"{path / _ABOUT}: no ended record; it lacks {sorted(lacking)}")
        for name, entry in _manifest(path).items():
            file = path / _ARTIFACTS / name
            if not file.resolve().is_relative_to((path / _ARTIFACTS).resolve()):
                raise XsdError(f"{path / MANIFEST}: {name} lies outside the record")
            if file.is_file() and sha256_file(file) != entry["sha256"]:
                raise XsdError(f"{file}: not what {MANIFEST} says; copy the record again")
    return found


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if (path / MANIFEST).is_file():
        found = read_json(path / MANIFEST)
    return found


def import_record(path: Path, parent: str, experiment_id: str) -> tuple[str, list[str]]:
    """Log one record as a run of its own; its id, and the artifacts that it came without."""
    from mlflow.entities import Metric, Param, RunTag

    about, client = read_json(path / _ABOUT), store.client()
    manifest = _manifest(path)
    absent = sorted(name for name in manifest if not (path / _ARTIFACTS / name).is_file())
    tags = {
        **about.get("tags", {}),
        "mlflow.parentRunId": parent,
        "mlflow.user": store.user(),
        "xsd.imported": path.name,
        "xsd.not_kept": ", ".join(absent)[:5000] or None,
    }
    run = client.create_run(
        experiment_id,
        start_time=about["begin_ms"],
        run_name=about["name"],
        tags={name: str(value) for name, value in tags.items() if value is not None},
    )
    run_id = run.info.run_id
    params = [Param(name, value[:6000] or "''") for name, value in about.get("params", {}).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    metrics = [Metric(*values) for values in _metrics(path)]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    for name in set(manifest) - set(absent):
        below = Path(name).parent.as_posix()
        client.log_artifact(run_id, str(path / _ARTIFACTS / name), None if below == "." else below)
    if manifest:
        client.log_artifact(run_id, str(path / MANIFEST))
    tables = [{"path": name, "type": "table"} for name in manifest if name.startswith("tables/")]
    if tables:
        client.log_batch(run_id, tags=[RunTag("mlflow.loggedArtifacts", json.dumps(tables))])
    client.set_terminated(run_id, about["status"], about["end_ms"])
    return run_id, absent


def _metrics(path: Path) -> Iterator[list[Any]]:
    file = path / _METRICS
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            key, value, now_ms, step = json.loads(line)
            yield [str(key), float(value), int(now_ms), int(step)]
        except (ValueError, TypeError) as error:
            raise XsdError(f"{file}: line {number} is no metric; copy the record again") from error
