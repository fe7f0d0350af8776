"""A page of tables and figures that needs no network, for light and dark screens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

from xsd.plots.style import plotly_js

_STYLE = Path(__file__).with_name("page.css")
_THEME = """
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
root.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", e => root.dataset.theme = e.matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click",
  () => root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark");
"""


class Figure(Protocol):
    """What is used of ``plotly.graph_objects.Figure``."""

    def to_html(self, *, full_html: bool, include_plotlyjs: bool, config: Any) -> str: ...


def page(title: str, lead: str, sections: Iterable[str], *, footer: str = "") -> str:
    """The whole document; ``lead`` and ``sections`` are HTML, ``title`` and ``footer`` text."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE.read_text(encoding="utf-8")}</style>
<script>{plotly_js()}</script>
</head>
<body>
<header><h1>{escape(title)}</h1><button id="theme" type="button">light / dark</button></header>
<main>
{lead}
{body}
</main>
<footer>{escape(footer)}</footer>
<script>{_THEME}</script>
</body>
</html>
"""


def section(heading: str, *parts: str) -> str:
    """A headed section; empty parts are left out, and a section of none vanishes."""
    kept = [part for part in parts if part]
    return f"<section><h2>{escape(heading)}</h2>{''.join(kept)}</section>" if kept else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(text)}</p>'


def tiles(values: Mapping[str, str]) -> str:
    """The few numbers that matter: caption -> value."""
    cells = "".join(
        f"<div><strong>{escape(value)}</strong><span>{escape(name)}</span></div>"
        for name, value in values.items()
    )
    return f'<div class="tiles">{cells}</div>'


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, breaks: Iterable[int] = ()
) -> str:
    """A table of ready-made texts; the first column is left-aligned, all others right.

    Args:
        breaks: indices of rows that begin a group.
    """
    groups = set(breaks)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f'<tr class="{"group" if index in groups else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def figure(made: Figure | None) -> str:
    """A figure whose script the page carries once; None leaves nothing."""
    if made is None:
        return ""
    config = {"displaylogo": False, "displayModeBar": False}
    html = made.to_html(full_html=False, include_plotlyjs=False, config=config)
    return f'<div class="wide figure">{html}</div>'
