"""Plotly figures as files: HTML that needs no network, and PNG where a browser can draw it."""

from __future__ import annotations

import atexit
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from xsd.files import atomic_path


@runtime_checkable
class Figure(Protocol):
    """What is used of ``plotly.graph_objects.Figure``."""

    def write_html(self, file: Path, *, include_plotlyjs: bool) -> None: ...

    def write_image(self, file: Path) -> None: ...


def write_figure(figure: Figure, folder: Path, name: str, *, still: bool = True) -> list[Path]:
    """Write ``name.html`` and, if ``still`` and a browser is found, ``name.png``."""
    html = folder / f"{name}.html"
    with atomic_path(html) as temporary:
        figure.write_html(temporary, include_plotlyjs=True)
    if not still or not _browser_found():
        return [html]
    image = folder / f"{name}.png"
    with atomic_path(image) as temporary, warnings.catch_warnings():
        # Plotly's own remark that a running browser keeps its options.
        warnings.filterwarnings("ignore", message="The kopts argument")
        figure.write_image(temporary)
    return [html, image]


@lru_cache(maxsize=1)
def _browser_found() -> bool:
    """Look once a process, start it once, and say once what its absence means.

    A browser that stays open draws a figure in a quarter of a second, a new one in three.
    """
    import kaleido
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False):
        kaleido.start_sync_server(silence_warnings=True)
        atexit.register(kaleido.stop_sync_server, silence_warnings=True)
        return True
    print("plots: no browser for kaleido, so figures are HTML only", file=sys.stderr)
    return False
