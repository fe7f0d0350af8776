from __future__ import annotations

import subprocess
import sys

import pytest

from xsd import config
from xsd.adapters.catalog import LEVELS, configure, level, num_parameters
from xsd.adapters.config import AdapterConfig, AdapterSizes
from xsd.errors import XsdError

PUBLISHED = {
    "L1": 2_113_537,
    "L2": 6_324_227,
    "L3": 25_188_355,
    "L4": 100_714_497,
    "L5": 102_819_841,
    "B1": 102_819_841,
    "L5F": 169_936_897,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_at_7b_width(name: str) -> None:
    assert num_parameters(name, 4096) == PUBLISHED[name]


def test_the_16m_of_l3_has_two_blocks() -> None:
    assert num_parameters("L3", 4096, AdapterSizes(num_blocks=2)) == 16_797_698


@pytest.mark.parametrize(
    ("given", "name"),
    [(1, "L1"), ("4", "L4"), ("l5f", "L5F"), (5, "L5"), (6, "L5F"), ("B1", "B1"), ("Text", "text")],
)
def test_levels_go_by_name_or_number(given: str | int, name: str) -> None:
    assert level(given).name == name


@pytest.mark.parametrize("given", ["L7", 7, 0, "None", ""])
def test_unknown_level_lists_the_valid_ones(given: str | int) -> None:
    with pytest.raises(XsdError, match=", ".join(LEVELS)):
        level(given)


def test_flags_know_the_same_levels() -> None:
    assert tuple(LEVELS) == config.LEVELS


def test_phase_and_selection_follow_the_shift() -> None:
    for row in LEVELS.values():
        head = row.name not in ("L1", "L2", "L3", "L4", "X1")
        assert row.shift == int(head)
        assert row.selection_metric == ("tau_6" if head else "accepted_prefix_22")
        assert row.phase == ("decode" if head else "gap")


def test_sizes_are_the_levels_own_unless_given() -> None:
    assert configure("L3", 8, 8, AdapterSizes()).bottleneck_dim == 1024
    assert configure("L3", 8, 8, AdapterSizes(bottleneck_dim=7)).bottleneck_dim == 7


@pytest.mark.parametrize(
    "sizes", [{"dropout": 1.0}, {"num_heads": 0}, {"bottleneck_dim": -1}, {"max_positions": 0}]
)
def test_bad_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(XsdError, match=next(iter(sizes))):
        AdapterConfig(level="L1", d_drafter=8, d_verifier=8, **sizes)


def test_catalog_does_not_import_torch() -> None:
    code = "import sys, xsd.adapters.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
