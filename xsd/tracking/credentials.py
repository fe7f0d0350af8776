"""Credentials come from the environment; nothing that is printed or kept holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

HIDDEN: Final = "***"
_URL: Final = re.compile(r"\b([A-Za-z][\w+.-]*://?)([^/\s@:]*):([^/\s]+)@")
"""One slash is what ``pathlib`` leaves of two."""
_USER: Final = re.compile(r"\b(?!models:/[^/])([A-Za-z][\w+.-]*://?)([^/\s@:]{16,})@")
"""A token in the user's place; a bucket or a host may follow. models:/<name>@champion has none."""
_QUERY: Final = re.compile(
    r"([?&](?:[\w.-]*(?:signature|credential|token|password|passwd|secret|api[_-]?key|access[_-]?key"
    r"(?:id)?)|sig)=)[^&#\s'\"]+",
    re.I,
)
"""Signed links (S3, GCS, Azure), and drivers that take a password as an option."""
_SECRET: Final = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|TOKEN|SECRET|API_KEY|ACCESS_KEY|ACCOUNT_KEY|CONNECTION_STRING"
    r"|CREDENTIALS)(_ID)?$",
    re.I,
)
_SHORTEST: Final = 6
"""Shorter values are words that stand for themselves elsewhere."""


def redacted(text: str) -> str:
    """``text`` without passwords and signatures of URLs, and without values of secret environment
    variables."""
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """``redacted`` for many texts: the environment is looked through once."""
    secrets = _secrets()

    def hide(text: str) -> str:
        shown = text
        if ":/" in text:
            shown = _URL.sub(rf"\1\2:{HIDDEN}@", shown)
            shown = _USER.sub(rf"\1{HIDDEN}@", shown)
            shown = _QUERY.sub(rf"\1{HIDDEN}", shown)
        for value in secrets:
            shown = shown.replace(value, HIDDEN)
        return shown

    return hide


def _secrets() -> list[str]:
    """Values of variables that are secret by their names, and passwords in URLs of any."""
    found = set()
    for name, value in os.environ.items():
        # A file of credentials is named, not shown: its path is no secret.
        if _SECRET.search(name) and not Path(value).is_file():
            found.add(value)
        if "://" in value and (match := _URL.search(value)):
            found.add(match[3])
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)
