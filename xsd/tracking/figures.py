"""Plotly figures as files: HTML that needs no network, and PNG where a browser can draw it."""

from __future__ import annotations

import atexit
import copy
import html
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from xsd.files import atomic_path, write_text


@runtime_checkable
class Figure(Protocol):
    """What is used of ``plotly.graph_objects.Figure``."""

    def to_html(self, *, full_html: bool, include_plotlyjs: bool, config: object) -> str: ...

    def update_layout(self, *, width: None, autosize: bool) -> object: ...

    def write_image(self, file: Path) -> None: ...


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin: 1rem; background: white">
{figures}
</body>
</html>
"""


def write_page(figures: Mapping[str, Figure], path: Path, title: str) -> None:
    """All figures below each other in one HTML.

    Plotly's script, 4.8 MB, is in it once. It cannot lie beside the page: the UI shows a page in a
    frame that reaches no other file.
    """
    parts = []
    for number, (name, figure) in enumerate(figures.items()):
        # As wide as the frame that shows it; a still has the width that it was made for.
        fitting = copy.deepcopy(figure)
        fitting.update_layout(width=None, autosize=True)
        drawn = fitting.to_html(
            full_html=False, include_plotlyjs=number == 0, config={"responsive": True}
        )
        parts.append(f'<section id="{name}">{drawn}</section>')
    write_text(path, _PAGE.format(title=html.escape(title), figures="\n".join(parts)))


def write_stills(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """``<name>.png`` of every figure, if a browser is found."""
    if not _browser_found():
        return []
    images = [folder / f"{name}.png" for name in figures]
    for image, figure in zip(images, figures.values(), strict=True):
        with atomic_path(image) as temporary, warnings.catch_warnings():
            # Plotly's own remark that a running browser keeps its options.
            warnings.filterwarnings("ignore", message="The kopts argument")
            figure.write_image(temporary)
    return images


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
