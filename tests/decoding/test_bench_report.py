"""What the benchmark says where samples failed."""

from __future__ import annotations

from dataclasses import replace

from tests.test_speedup import trace
from xsd import bench_report
from xsd.bench import BenchItem
from xsd.pairs.base import ModelPair
from xsd.speedup import measured

PLAIN = [trace("vl_baseline", key, 100.0) for key in "abc"]
SOME = [*PLAIN, *(trace("E1_decode", key, 50.0) for key in "ab")]


def cells(text: str) -> dict[str, dict[str, str]]:
    lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[0].splitlines()]
    header, _, *rows = lines
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in rows}


def test_the_table_says_of_how_many_samples_a_row_is(items: list[BenchItem]) -> None:
    names = ["vl_baseline", "E1_decode", "E2_decode"]
    summary = measured(SOME, num_attempted=3, strategies=names)
    text = bench_report.table(summary, SOME, items)
    found = cells(text)
    assert [found[name]["Samples"] for name in names] == ["3 of 3", "2 of 3", "0 of 3"]
    assert found["E1_decode"]["Speedup"] == "2.00x" and found["E1_decode"]["Lossless"] == "yes"
    assert set(found["E2_decode"].values()) == {"E2_decode", "0 of 3", "-"}
    assert "Samples: on which neither" in text and "nan" not in text


def test_where_none_failed_there_is_nothing_to_say(items: list[BenchItem]) -> None:
    assert "Samples" not in bench_report.table(measured(PLAIN), PLAIN, items)


def test_what_is_logged_counts_samples_and_those_that_failed() -> None:
    summary = measured(SOME, num_attempted=3, strategies=["vl_baseline", "E1_decode", "E2_decode"])
    found = bench_report.metrics(summary)
    counts = {
        name: (found[f"measured.{name}.num_samples"], found[f"measured.{name}.num_failed"])
        for name in ("vl_baseline", "E1_decode", "E2_decode")
    }
    assert counts == {"vl_baseline": (3, 0), "E1_decode": (2, 1), "E2_decode": (0, 3)}
    assert not any(value != value for value in found.values())


def test_all_configs_are_lossless_where_each_is_known_to_be() -> None:
    names = ["vl_baseline", "E1_decode", "E2_decode"]
    differs = [*SOME, trace("E1_decode", "c", 50.0, first_difference=0)]
    assert bench_report._lossless(measured(SOME)) == "true"
    assert bench_report._lossless(measured(SOME, strategies=names)) == "unknown"
    assert bench_report._lossless(measured(differs, strategies=names)) == "false"
    headline = bench_report._headline(measured(SOME, strategies=names))
    assert (
        headline
        == "benchmark: E1_decode is 2.00x plain decoding; 1 of 2 configs keep every answer."
    )


def test_the_example_is_one_that_plain_decoding_has_too(
    pair: ModelPair, items: list[BenchItem]
) -> None:
    alone = trace("E1_decode", "d", 50.0, cycle_drafted=(4,), cycle_accepted=(4,))
    assert bench_report.example([*PLAIN, alone], items, pair) is None


def test_nothing_left_of_a_total_is_a_plain_zero(items: list[BenchItem]) -> None:
    whole = [replace(made, decode_ms=made.decode_ms + 1e-4) for made in PLAIN]
    text = bench_report.table(measured(whole), whole, items)
    assert "| rest | sum |" in text and "| 0.00 | 100.00 |" in text
