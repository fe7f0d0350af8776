"""The benchmark of the dashboard runs; its numbers are nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import dashboard


def test_it_fills_a_store_and_loads_it(tracking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.fill(25)
    dashboard.measure()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15].strip() for line in lines] == [
        "imports and con", "reading 25 runs", "overview page", "looking again",
    ]  # fmt: skip
