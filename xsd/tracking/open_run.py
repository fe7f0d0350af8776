"""The open run of a stage: what commands log through."""

from __future__ import annotations

import json
import math
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xsd.errors import XsdError
from xsd.files import sha256_file, sha256_json, write_json
from xsd.tracking import store, writes
from xsd.tracking.artifacts import local_folder, place
from xsd.tracking.credentials import redacted, redactor
from xsd.tracking.figures import Figure, write_page, write_stills
from xsd.tracking.products import CONTENTS, MANIFEST, given_as
from xsd.tracking.spool import Outbox
from xsd.tracking.writes import BATCH, PointOfCurve

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.tracking import MlflowClient

_FLUSH_SECONDS: Final = 5.0
_VALUE_LENGTH: Final = 6000
_TAG_LENGTH: Final = 5000


@dataclass
class Run:
    """The open run of a stage. Commands log through it and know nothing else of the store."""

    client: MlflowClient
    run_id: str
    experiment_id: str
    stage: str
    pair: str
    artifact_uri: str
    key: str | None = None
    """The stage key, where it became known after the run was opened."""
    manifest: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Artifact path -> sha256 and size; written as an artifact when the run ends well."""
    _metrics: list[PointOfCurve] = field(default_factory=list)
    _params: dict[str, str] = field(default_factory=dict)
    _tags: dict[str, str] = field(default_factory=dict)
    _flushed: float = field(default_factory=time.monotonic)
    _non_finite: set[str] = field(default_factory=set)
    _said: list[str] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.client, self.run_id)

    @property
    def uri(self) -> str:
        return f"runs:/{self.run_id}"

    @property
    def work_name(self) -> str:
        """A folder name that the same work finds again after an interruption."""
        assert self.key is not None, "connect the run to its inputs first"
        return f"{self.stage}_{self.key[:12]}"

    @property
    def folder(self) -> Path | None:
        """The artifact folder, if it is one of this machine."""
        return local_folder(self.artifact_uri)

    def log(self, metrics: Mapping[str, float], step: int = 0, model_id: str | None = None) -> None:
        """Buffer metrics. ``accept@0.90`` becomes ``accept_90``; values that are not finite are
        left out of the curve and named in the tag ``xsd.not_finite``."""
        with self._lock:
            self._metrics += self._points(metrics, step, model_id)
            if len(self._metrics) >= BATCH or time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self.flush()

    def sample(self, metrics: Mapping[str, float], step: int) -> None:
        """Buffer metrics from another thread; they go out with what this one writes next."""
        with self._lock:
            self._metrics += self._points(metrics, step)

    def say(self, line: str) -> None:
        """Print a line about what was done, and add it to the description of the run."""
        shown = redacted(line)
        print(shown)
        self._said.append(shown)
        self.tag({"mlflow.note.content": "\n\n".join(self._said)})

    def _points(
        self, metrics: Mapping[str, float], step: int, model_id: str | None = None
    ) -> list[PointOfCurve]:
        now_ms = int(time.time() * 1000)
        keyed = {re.sub(r"@0?\.", "_", name): float(value) for name, value in metrics.items()}
        self._non_finite |= {key for key, value in keyed.items() if not math.isfinite(value)}
        finite = {key: value for key, value in keyed.items() if math.isfinite(value)}
        return [(key, value, now_ms, step, model_id) for key, value in finite.items()]

    def flush(self) -> None:
        """Write what is buffered, in one go."""
        with self._lock:
            if self._metrics or self._params or self._tags:
                self.outbox.send(writes.batch(self._metrics, self._params, self._tags))
            self._metrics, self._params, self._tags = [], {}, {}
            self._flushed = time.monotonic()

    def params(self, config: Mapping[str, object]) -> None:
        """Buffer a resolved configuration under ``cfg.``: bare names are MLproject's raw values."""
        hide = redactor()
        for name, value in config.items():
            self._params[f"cfg.{name}"] = hide(str(value))[:_VALUE_LENGTH] or "''"

    def tag(self, tags: Mapping[str, object]) -> None:
        """Buffer tags; None is left out."""
        self._tags |= as_tags(tags)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep one file; hard-linked where the store is local, so it takes no second space.

        Raises:
            XsdError: there is no such file.
        """
        if not path.is_file():
            raise XsdError(f"{path}: no such file to keep as an artifact")
        name = f"{folder}/{path.name}" if folder else path.name
        self._place(path, name)
        self.manifest[name] = {"sha256": sha256_file(path), "num_bytes": path.stat().st_size}

    def _place(self, path: Path, name: str) -> None:
        if self.folder is None:
            below = Path(name).parent.as_posix()
            self.outbox.send(writes.artifact(path, None if below == "." else below))
        else:
            place(path, self.folder / name)

    def artifacts(self, root: Path, folder: str | None = None) -> None:
        """Keep every file below ``root``, hidden ones excepted, under the same relative path."""
        if not root.is_dir():
            raise XsdError(f"{root}: no such folder to keep as artifacts")
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                below = (Path(folder or ".") / relative.parent).as_posix()
                self.artifact(path, None if below == "." else below)

    def figures(
        self,
        figures: Mapping[str, Figure],
        output_dir: Path | None = None,
        *,
        still: bool = True,
    ) -> list[Path]:
        """Keep plotly figures as one page, ``figures/<stage>.html``, and, if ``still``, each as
        ``figures/<name>.png`` where a browser is found.

        Returns the files in ``output_dir``; empty if none was given.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = output_dir or Path(temporary)
            page = folder / f"{self.stage}.html"
            write_page(figures, page, f"{self.stage} {self.run_id}")
            written = [page, *(write_stills(figures, folder) if still else [])]
            for path in written:
                self.artifact(path, "figures")
        return written if output_dir else []

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Keep a frame as ``tables/<name>.json``, which the UI shows and compares across runs."""
        text = frame.to_json(orient="split", index=False, double_precision=6)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.json"
            path.write_text(text, encoding="utf-8")
            self.artifact(path, "tables")
        tables = [key for key in self.manifest if key.startswith("tables/")]
        logged = [{"path": path, "type": "table"} for path in tables]
        self.tag({"mlflow.loggedArtifacts": json.dumps(logged)})

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Link a data set, by digest, as an input of the run."""
        self.outbox.send(writes.dataset(name, digest, redacted(source), context))

    def log_model(
        self,
        name: str,
        files: Sequence[Path],
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
    ) -> str | None:
        """Keep files (a checkpoint, its configuration) as a logged model.

        The model carries the sha256 of every file as tag ``sha256.<file>``, by which
        ``products.load`` refuses one that was altered.

        Returns:
            The id of the model, whose URI is ``models:/<id>``; None: the server is away, and the
            model is made when it is back.
        """
        hide = redactor()
        write = writes.model(
            self.experiment_id,
            name,
            files,
            {key: hide(str(value))[:_VALUE_LENGTH] for key, value in (params or {}).items()},
            {key: hide(str(value)) for key, value in (tags or {}).items()},
            self._points(metrics or {}, step),
        )
        return self.outbox.send(write)

    def link(self) -> str:
        """The page of this run in the UI."""
        return store.run_link(self.experiment_id, self.run_id)

    def end(self, status: str) -> None:
        """Write what is buffered, and set the final status."""
        if self._non_finite:
            self.tag({"xsd.not_finite": ", ".join(sorted(self._non_finite))})
        self.flush()
        self.outbox.send(writes.end(status, int(time.time() * 1000)))
        if self.outbox.has_undelivered:
            self.outbox.retry(at_once=True)

    def finish_manifest(self) -> None:
        """Write the manifest, and tag the digest by which later stages know this product.

        Figures are left out of the digest: the same curve is never the same file twice.
        """
        if self.manifest:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / MANIFEST
                write_json(path, dict(sorted(self.manifest.items())))
                self._place(path, MANIFEST)
        kept = {name: at for name, at in self.manifest.items() if not name.startswith("figures/")}
        self.tag({"xsd.digest": sha256_json(kept) if kept else None})
        self.tag({CONTENTS: " ".join(given_as(self.manifest)) if kept else None})
        self.tag({"xsd.num_bytes": sum(entry["num_bytes"] for entry in self.manifest.values())})


def as_tags(values: Mapping[str, object]) -> dict[str, str]:
    """Texts that MLflow takes, without credentials; None is left out."""
    hide = redactor()
    return {
        name: hide(str(value))[:_TAG_LENGTH] for name, value in values.items() if value is not None
    }
