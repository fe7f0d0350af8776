"""Files of a run: linked where the store is a local folder, uploaded where it is not."""

from __future__ import annotations

import errno
import os
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

from xsd.files import atomic_path


def local_folder(artifact_uri: str) -> Path | None:
    """The folder behind an artifact URI, if it is one of this machine."""
    parts = urllib.parse.urlparse(artifact_uri)
    if parts.scheme == "":
        return Path(artifact_uri)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    return None


def place(source: Path, target: Path) -> None:
    """Make ``target`` hold ``source``'s bytes: a hard link, so that they are on disk once.

    Products are written under a temporary name and renamed, never changed in place, so a later
    version of ``source`` leaves the linked file as it was. Across file systems it is a copy.
    """
    if source.resolve() == target.resolve():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source.resolve())
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # replacing a link by its own twin leaves both names
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        with atomic_path(target) as copy:
            shutil.copyfile(source, copy)
