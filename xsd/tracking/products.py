"""What a stage leaves behind and the next one takes: opened by URI, and checked by sha256."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xsd.errors import XsdError
from xsd.files import read_json, sha256_file, sha256_json
from xsd.tracking import store
from xsd.tracking.artifacts import local_folder
from xsd.tracking.credentials import redacted

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run

MANIFEST: Final = "manifest.json"
_HASHED_BYTES: Final = 256 << 20
"""Larger files are compared by size here; the chunk store hashes them when it opens them."""
_SHA_TAG: Final = "sha256."
CONTENTS: Final = "xsd.contents"
"""Tag of a run: what a path to its files would have as a digest, shortened."""
_SHORT: Final = 16


@dataclass(frozen=True, slots=True)
class Product:
    """The files of a finished run, of a logged model, or of a plain path."""

    uri: str
    path: Path
    digest: str
    """Of the content: equal digests mean equal products, whichever run made them."""
    run_id: str | None = None
    model_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def load(source: str | Path, expect: Mapping[str, object] | None = None) -> Product:
    """Open a path, ``runs:/<id>[/sub]``, ``models:/<name>@<alias>`` (``/<version>``, ``/<id>``),
    or hidden states in object storage (``s3://bucket/x``, whatever fsspec knows).

    Args:
        expect: tags that must agree where the product has them, such as ``{"pair": "tiny"}``.

    Raises:
        XsdError: it does not exist, a file was altered, or a tag disagrees.
    """
    text = str(source)
    if text.startswith("runs:/"):
        product = _load_run(text)
    elif text.startswith("models:/"):
        product = _load_model(text)
    elif "://" in text:
        product = _load_stores(text)
    else:
        product = from_path(Path(text))
    for name, value in (expect or {}).items():
        found = product.tags.get(name)
        if found is not None and found != str(value):
            raise XsdError(f"{text}: made for {name} {found!r}, not {str(value)!r}; choose another")
    return product


def from_path(path: Path) -> Product:
    """A file or folder that no run is known for."""
    if not path.exists():
        raise XsdError(f"{path}: no such file or folder; check the path")
    return Product(uri=str(path), path=path, digest=_digest_of(path))


def from_run(run: Run, subfolder: str = "") -> Product:
    """A run's artifacts, as they are: ``altered`` tells whether they are whole."""
    folder = local_folder(run.info.artifact_uri) or _fetched(run, subfolder)
    tags = dict(run.data.tags)
    uri = f"runs:/{run.info.run_id}" + (f"/{subfolder}" if subfolder else "")
    return Product(
        uri=uri,
        path=folder / subfolder,
        digest=tags.get("xsd.digest", run.info.run_id),
        run_id=run.info.run_id,
        model_id=tags.get("xsd.model_id"),
        tags=tags,
    )


def altered(folder: Path, below: str = "") -> str | None:
    """Name the first artifact that is not what the run's manifest says; None: all are whole."""
    if not (folder / MANIFEST).is_file():
        return None
    for name, entry in read_json(folder / MANIFEST).items():
        if below and not name.startswith(f"{below}/") and name != below:
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["num_bytes"]:
            return f"{name} has another size"
        if entry["num_bytes"] <= _HASHED_BYTES and sha256_file(path) != entry["sha256"]:
            return f"{name} was altered"
    return None


def _load_run(uri: str) -> Product:
    from mlflow.exceptions import MlflowException

    run_id, _, subfolder = uri.removeprefix("runs:/").strip("/").partition("/")
    try:
        run = store.client().get_run(run_id)
    except MlflowException as error:
        raise XsdError(f"{uri}: no such run in {redacted(store.tracking_uri())}") from error
    if reused := run.data.tags.get("xsd.reused"):
        return _load_run(f"{reused}/{subfolder}")
    product = from_run(run, subfolder)
    if subfolder and not product.path.exists():
        raise XsdError(f"{uri}: the run has no such artifact")
    root = product.path if not subfolder else product.path.parents[subfolder.count("/")]
    if damage := altered(root, subfolder):
        raise XsdError(f"{uri}: {damage} since the run wrote it; run the stage again")
    return product


def _load_model(uri: str) -> Product:
    from mlflow.exceptions import MlflowException

    try:
        model, tags = logged_model(uri.removeprefix("models:/"))
    except MlflowException as error:
        raise XsdError(
            f"{uri}: no such model in {redacted(store.tracking_uri())}; xsd registry lists them"
        ) from error
    folder = local_folder(model.artifact_location) or _fetched_model(model.model_id)
    hashed = {name for name in tags if name.startswith(_SHA_TAG)}
    digests = {name.removeprefix(_SHA_TAG): tags[name] for name in hashed}
    for name, digest in digests.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise XsdError(f"{uri}: {name} is missing or was altered; train and promote again")
    return Product(
        uri=uri,
        path=folder,
        digest=sha256_json(digests),
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags=tags,
    )


def _load_stores(uri: str) -> Product:
    """Hidden states from elsewhere, in a folder named by what their indices say."""
    from xsd.hidden.index import INDEX
    from xsd.hidden.place import Place
    from xsd.hidden.rewrite import copy

    place = Place(uri)
    if place.folder is not None:
        return from_path(place.folder)
    stores = place.stores()
    digest = sha256_json([found.sha256(INDEX) for found in stores])
    folder = downloads() / f"store_{digest[:16]}"
    with store.lock(f"download-{folder.name}"):
        for found in stores:
            name = "" if found is place else found.uri.rpartition("/")[2]
            if not (folder / name / INDEX).is_file():
                copy(found, Place(str(folder / name)))
    return Product(uri=uri, path=folder, digest=digest)


def logged_model(name: str) -> tuple[LoggedModel, dict[str, str]]:
    """The logged model behind an alias, a version or an id; with the version's tags on top."""
    client = store.client()
    if match := re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))", name):
        if match[2]:
            version = client.get_model_version_by_alias(match[1], match[2])
        else:
            version = client.get_model_version(match[1], match[3])
        # MLflow may leave model_id empty and keep it in the source alone.
        model = client.get_logged_model(version.model_id or version.source.removeprefix("models:/"))
        return model, {**model.tags, **version.tags}
    model = client.get_logged_model(name)
    return model, dict(model.tags)


def _fetched(run: Run, subfolder: str) -> Path:
    """A copy of a run's artifacts, or of those below ``subfolder``, from a store elsewhere.

    What a finished run has is fetched once; ``xsd gc`` lists the copies.
    """
    client = store.client()
    folder = downloads() / str(run.info.run_id)
    whole = folder / ".whole"
    if whole.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with store.lock(f"download-{run.info.run_id}"):
        if not subfolder:
            client.download_artifacts(run.info.run_id, "", str(folder))
            if run.info.status == "FINISHED":
                whole.touch()
            return folder
        has_manifest = any(item.path == MANIFEST for item in client.list_artifacts(run.info.run_id))
        for name in (MANIFEST, subfolder) if has_manifest else (subfolder,):
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    client.download_artifacts(run.info.run_id, name, temporary)
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (Path(temporary) / name).replace(folder / name)
    return folder


def _fetched_model(model_id: str) -> Path:
    import mlflow

    folder = downloads() / str(model_id)
    with store.lock(f"download-{model_id}"):
        if not folder.is_dir():
            temporary = folder.with_name(f".{model_id}.{os.getpid()}.tmp")
            temporary.mkdir(parents=True)
            mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=str(temporary))
            temporary.replace(folder)
    return folder


def downloads() -> Path:
    """Copies of what other machines keep."""
    return store.local_root() / "downloads"


def _digest_of(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    entries: dict[str, int | str] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            size = file.stat().st_size
            entries[name.as_posix()] = size if size > _HASHED_BYTES else sha256_file(file)
    return sha256_json(entries)


def given_as(manifest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Digests of the paths that a run's files may be given by: all of them, a folder, one file.

    What the run says about itself (figures, tables) is in no such folder.
    """
    folders: dict[str, dict[str, int | str]] = {"": {}}
    files = []
    for name, entry in sorted(manifest.items()):
        top, _, rest = name.partition("/")
        if rest and top in ("figures", "tables"):
            continue
        size, sha256 = entry["num_bytes"], entry["sha256"]
        known = size if size > _HASHED_BYTES else sha256
        folders[""][name] = known
        if rest:
            folders.setdefault(top, {})[rest] = known
        else:
            files.append(sha256)
    digests = [sha256_json(dict(sorted(folder.items()))) for folder in folders.values()]
    return [digest[:_SHORT] for digest in (*digests, *files)]


def maker(digest: str) -> str | None:
    """The newest finished run that made what lies at a path; None: none is known."""
    found = store.client().search_runs(
        store.experiment_ids(),
        f"attributes.status = 'FINISHED' AND tags.`{CONTENTS}` LIKE '%{digest[:_SHORT]}%'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
    )
    return str(found[0].info.run_id) if found else None
