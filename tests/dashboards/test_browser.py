"""The dashboard in a real browser, at two widths, light and dark; skipped where there is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.serving import make_server

from dashboards.app import PAGES, build
from dashboards.archive import Archive

_SECONDS = 60


@pytest.fixture
def address(filled: dict[str, str]) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, build(Archive()).server, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()


def wait(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, _SECONDS).until(
        lambda one: one.execute_script(f"return {script}")
    )


def size(browser: Any, width: int) -> None:
    values = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_every_page_is_drawn(browser: Any, address: str, width: int) -> None:
    size(browser, width)
    for path in PAGES:
        browser.get(address + path)
        wait(browser, "document.querySelectorAll('.card h2').length > 0")
        wait(browser, "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
        is_too_wide = "document.documentElement.scrollWidth > window.innerWidth"
        assert not browser.execute_script(f"return {is_too_wide}"), path
    said = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not said


@pytest.mark.slow
def test_a_reader_filters_sorts_and_darkens(browser: Any, address: str) -> None:
    from selenium.webdriver.common.by import By

    size(browser, 1280)
    browser.get(f"{address}/?pair=tiny")
    first = "document.querySelector('.card tbody td')?.innerText"
    assert wait(browser, first) == "X1+E3"
    assert "pair=tiny" in browser.current_url
    # A second click on a heading turns the order round.
    for leader in ("vl_baseline", "E3_decode"):
        wait(browser, "document.querySelectorAll('button.sort').length > 9")
        headings = browser.find_elements(By.CSS_SELECTOR, ".card button.sort")
        next(one for one in headings if one.text.startswith("total ms")).click()
        wait(browser, f"{first} === '{leader}'")
    grounds = []
    for _ in range(2):
        browser.find_element(By.ID, "theme").click()
        style = "getComputedStyle(document.body).backgroundColor"
        grounds.append(
            (wait(browser, "document.documentElement.dataset.theme"), wait(browser, style))
        )
    assert dict(grounds) == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert loaded and all(name.startswith((address, "data:")) for name in loaded)
