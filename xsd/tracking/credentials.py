"""Credentials come from the environment; nothing that is printed or kept holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Final

HIDDEN: Final = "***"
_URL: Final = re.compile(r"\b([A-Za-z][\w+.-]*://)([^/\s@:]*):([^/\s]+)@")
_SECRET: Final = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|API_KEY|ACCESS_KEY)(_ID)?$", re.I)
_SHORTEST: Final = 6
"""Shorter values are words that stand for themselves elsewhere."""


def redacted(text: str) -> str:
    """``text`` without passwords of URLs and without values of secret environment variables."""
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """``redacted`` for many texts: the environment is looked through once."""
    secrets = _secrets()

    def hide(text: str) -> str:
        shown = _URL.sub(rf"\1\2:{HIDDEN}@", text) if "://" in text else text
        for value in secrets:
            shown = shown.replace(value, HIDDEN)
        return shown

    return hide


def _secrets() -> list[str]:
    """Values of variables that are secret by their names, and passwords in URLs of any."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET.search(name):
            found.add(value)
        if "://" in value and (match := _URL.search(value)):
            found.add(match[3])
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)
