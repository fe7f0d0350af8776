"""MLflow's own UI shows what a run keeps, in a real browser; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from tests.dashboards.test_browser import size, wait
from tests.tracking.server import Server
from xsd.tracking import figures
from xsd.tracking.run import stage_run


@pytest.fixture
def server(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    started = Server(tracking)
    started.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    yield started
    started.kill()


@pytest.mark.slow
def test_links_open_the_run_and_its_figures_are_drawn(
    browser: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_browser_found", lambda: False)
    with stage_run("evaluate", "tiny", {"gamma": 4}, tags={"level": "E1"}) as run:
        run.figures({name: go.Figure(go.Bar(y=[1, 3, 2])) for name in ("one", "two")})
        run.table("per_sample", pd.DataFrame({"sample": ["clip seven"], "tau": [3.25]}))
        run.say("evaluate E1: all is well")
    size(browser, 1500)
    text = "document.body.innerText"
    browser.get(run.link())
    wait(browser, f"{text}.includes('evaluate E1: all is well')")
    assert browser.execute_script(f"return {text}.includes('Model training')")
    page, _, query = run.link().partition("?")
    browser.get("about:blank")
    browser.get(f"{page}/artifacts/tables/per_sample.json?{query}")
    wait(browser, f"{text}.includes('clip seven') && {text}.includes('View as table')")
    browser.get("about:blank")
    browser.get(f"{page}/artifacts/figures/evaluate.html?{query}")
    frame = wait(browser, "document.querySelector('iframe')")
    browser.switch_to.frame(frame)
    wait(browser, "document.querySelectorAll('.js-plotly-plot .bars path').length === 6")
    # The page has no side to scroll to.
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= window.innerWidth + 1"
    )
