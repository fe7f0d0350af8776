"""Credentials come from the environment; nothing that is printed or kept holds one."""

from __future__ import annotations

import os
import re
from typing import Final

HIDDEN: Final = "***"
_URL: Final = re.compile(r"\b([A-Za-z][\w+.-]*://)([^/\s@:]*):([^/\s]+)@")
_SECRET: Final = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|API_KEY|ACCESS_KEY)(_ID)?$", re.I)
_SHORTEST: Final = 6
"""Shorter values are words that stand for themselves elsewhere."""


def redacted(text: str) -> str:
    """``text`` without passwords of URLs and without values of secret environment variables."""
    shown = _URL.sub(rf"\1\2:{HIDDEN}@", text)
    for value in _secrets():
        shown = shown.replace(value, HIDDEN)
    return shown


def _secrets() -> list[str]:
    """Values of variables that are secret by their names, and passwords in URLs of any."""
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET.search(name) and len(value) >= _SHORTEST
    }
    for value in os.environ.values():
        if match := _URL.search(value):
            found |= {match[3]} if len(match[3]) >= _SHORTEST else set()
    return sorted(found, key=len, reverse=True)
