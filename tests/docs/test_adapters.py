"""The numbers of docs/adapters.md are the catalog's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from xsd.adapters.catalog import LEVELS, build, configure, num_parameters
from xsd.adapters.config import AdapterSizes

TEXT = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
ROWS = {
    cells[0]: cells
    for line in TEXT.splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in LEVELS
    and len(cells) == 8
}


def million_multiply_adds(name: str, width: int) -> float:
    """Weight matrices that one row passes: no tables, no once-a-clip projections."""
    with torch.device("meta"):
        adapter = build(configure(name, width, width, AdapterSizes()))
    once = "cross.key_value" if adapter.row.visual else "nothing"
    return sum(
        parameter.numel() / 1e6
        for key, parameter in adapter.named_parameters()
        if parameter.dim() == 2 and not key.endswith("positions") and once not in key
    )


def test_every_level_has_a_row_and_a_paragraph() -> None:
    assert set(ROWS) == set(LEVELS)
    for name in LEVELS:
        assert re.search(rf"^\*\*{name}\b", TEXT, re.MULTILINE), name


@pytest.mark.parametrize("name", LEVELS)
def test_row_is_the_catalogs(name: str) -> None:
    row = LEVELS[name]
    _, inputs, shift, loss, at_4096, at_128, work, metric = ROWS[name]
    assert inputs == row.inputs
    assert int(shift) == row.shift
    assert loss == row.loss
    assert metric == row.selection_metric
    assert int(at_4096.replace(",", "")) == num_parameters(name, 4096)
    assert int(at_128.replace(",", "")) == num_parameters(name, 128)
    assert float(work) == pytest.approx(million_multiply_adds(name, 4096), abs=0.06)


def test_lm_head_beside_them() -> None:
    assert f"{32064 * 4096 / 1e6:.1f} million" in TEXT
