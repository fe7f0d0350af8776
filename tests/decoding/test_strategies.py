from __future__ import annotations

import pytest

from xsd.config import LEVELS
from xsd.decoding.config import ALL_CONFIGS, DecodingConfig
from xsd.decoding.strategies import (
    adapter_names,
    config_of,
    needs_drafter,
    parse,
    parse_all,
    strict_rows,
)
from xsd.errors import XsdError


def test_every_config_of_the_table_parses_under_its_own_name() -> None:
    for name in ALL_CONFIGS:
        assert parse(name, 4).name == name


def test_what_a_name_means() -> None:
    both = parse("X1+E3@shuffled_events", 5)
    assert (both.gap, both.head, both.gamma, both.shuffled_events) == ("X1", "E3", 5, True)
    assert adapter_names(both) == ["X1", "E3"]
    free = parse("L4+VL:free", 5)
    assert (free.gap_mode, free.gamma, adapter_names(free)) == ("free", 0, ["L4:free"])
    assert adapter_names(parse("template+VL", 1)) == []
    assert not needs_drafter(parse("E3_decode", 4)) and not needs_drafter(parse("template+VL", 1))
    assert all(needs_drafter(parse(n, 4)) for n in ("L5_decode", "E2_decode", "drafter+VL"))


def test_controls_and_trees() -> None:
    names = [s.name for s in parse_all("synthetic:0.9,0.7, oracle,X1+ngram,synthetic:.5", 4)]
    assert names == ["vl_baseline", "synthetic:0.9,0.7", "oracle", "X1+ngram", "synthetic:.5"]
    assert adapter_names(parse("X1+ngram", 4)) == ["X1"]
    assert adapter_names(parse("oracle", 4)) == [] and not needs_drafter(parse("oracle", 4))
    text = parse("text", 4)
    assert (text.head, adapter_names(text), needs_drafter(text)) == ("text", ["text"], False)
    tree = parse("E3_tree", 6)
    assert (tree.head, tree.gamma, tree.tree) == ("E3", 6, True)


def test_the_strict_shape_holds_the_largest_pass() -> None:
    config = DecodingConfig(strict=True, tree_nodes=12, max_gap_drafts=9, max_new_tokens=30)
    for names, rows in (
        ("vl_baseline", 1),
        ("E1_decode", 5),
        ("X1+VL", 9),
        ("E3_tree,X1+E3", 13),
    ):
        assert strict_rows(parse_all(names, 4), config) == rows
    short = DecodingConfig(strict=True, max_gap_drafts=40, max_new_tokens=30)
    assert strict_rows([parse("drafter+VL", 4)], short) == 30
    assert strict_rows([parse("E1_tree", 4)], DecodingConfig()) is None


@pytest.mark.parametrize("other", [{"last_chunk": 16}, {"temperature": 0.5}])
def test_what_strict_cannot_hold_is_refused(other: dict[str, float]) -> None:
    with pytest.raises(XsdError, match=f"strict: {next(iter(other))}="):
        DecodingConfig(strict=True, **other)


@pytest.mark.parametrize("adapter", [*LEVELS, "L4:free"])
def test_every_adapter_has_a_config_of_its_own(adapter: str) -> None:
    assert config_of(adapter) in ALL_CONFIGS
    assert adapter_names(parse(config_of(adapter), 1)) == [adapter]


@pytest.mark.parametrize(
    "name",
    [
        "synthetic",
        "oracle:0.5",
        "B1_tree",
        "E2_tree",
        "L9+VL",
        "L5+VL",
        "E3",
        "L4_decode",
        "text_decode",
        "L4+VL@upside_down",
        "",
    ],
)
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(XsdError, match=r"known|only"):
        parse(name, 4)
