"""The tables and headline numbers that the report and the live dashboard share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from xsd.adapters.catalog import LEVELS, level
from xsd.plots.style import TIMES, base_level, kind

_DASH = "-"
CONTROLS_NOTE = (
    "What would have been accepted anyway? template+VL drafts the training set's commonest "
    "answer to the question, drafter+VL the drafter's own words without an adapter, text what "
    "a head predicts from the words said so far, and @shuffled_events shows the drafter "
    "another scene. What a config gains over its shuffled twin is what the events contribute."
)


@dataclass(frozen=True)
class Column:
    """A column of a table: what is shown of a row, and what it is sorted by."""

    key: str
    title: str
    pattern: str = "{}"
    """A format for the value; a value that is missing becomes a dash."""

    def text(self, value: Any) -> str:
        missing = value is None or (not isinstance(value, (list, dict)) and pd.isna(value))
        return _DASH if missing or value == "" else self.pattern.format(value)


@dataclass(frozen=True)
class Table:
    """Rows and how to show them; columns that no row has are left out by ``shown``."""

    columns: tuple[Column, ...]
    frame: pd.DataFrame
    group: str = ""
    """A line parts rows that differ in this column; empty: none does."""

    def shown(self) -> list[Column]:
        has = self.frame.notna().any()
        return [column for column in self.columns if has.get(column.key, False)]

    def breaks(self) -> list[int]:
        """Indices of rows that begin a group, but for the first."""
        values = list(self.frame[self.group]) if self.group else []
        return [i for i in range(1, len(values)) if values[i] != values[i - 1]]


_CONFIG_COLUMNS = (
    Column("strategy", "config"),
    Column("num_samples", "samples", "{:.0f}"),
    Column("prefill_ms", "prefill ms", "{:.1f}"),
    Column("decode_ms", "decode ms", "{:.1f}"),
    Column("total_ms", "total ms", "{:.1f}"),
    Column("tokens_accepted", "accepted", "{:.1f}"),
    Column("tau", "tau", "{:.2f}"),
    Column("num_free", "free", "{:.1f}"),
    Column("speedup", "speedup", "{:.2f}" + TIMES),
    Column("modelled_speedup", "modelled", "{:.2f}" + TIMES),
    Column("time_p95", "time p95", "{:.2f}"),
    Column("share_slower", "slower", "{:.0%}"),
    Column("share_drafting", "drafting", "{:.0%}"),
    Column("verdict", "lossless"),
    Column("started", "measured", "{:%d %b %H:%M}"),
)
_LEVEL_COLUMNS = (
    Column("level", "level"),
    Column("reads", "reads"),
    Column("num_parameters", "parameters", "{:,.0f}"),
    Column("cos_sim_mean", "cos_sim", "{:.3f}"),
    Column("accept_90", "accept@0.90", "{:.1%}"),
    Column("token_top1_match", "token match", "{:.1%}"),
    Column("accept_length", "accept length", "{:.2f}"),
    Column("modelled.speedup_e2e", "modelled speedup", "{:.2f}" + TIMES),
    Column("started", "evaluated", "{:%d %b %H:%M}"),
)
_CONTROL_COLUMNS = (
    Column("strategy", "config"),
    Column("gap_accepted", "accepted in the gap", "{:.2f}"),
    Column("tokens_accepted", "accepted in all", "{:.2f}"),
    Column("speedup", "speedup", "{:.2f}" + TIMES),
)


def configs(measured: pd.DataFrame) -> Table:
    """A row a config, from a benchmark's summary or ``overview.configs_frame``."""
    frame = measured.assign(
        kind=measured["strategy"].map(kind),
        num_free=measured["num_free"].where(measured["num_free"] > 0),
        verdict=[_verdict(row) for _, row in measured.iterrows()],
    )
    return Table(_CONFIG_COLUMNS, frame, group="kind")


def levels(evaluated: pd.DataFrame) -> Table:
    """A row a level, from ``overview.levels_frame``: those of the gap, then heads, as the catalog
    has them, and variants behind their level."""
    order = sorted(LEVELS, key=lambda name: LEVELS[name].phase == "decode")
    by = evaluated["level"].map(lambda name: (order.index(base_level(name)), name))
    frame = evaluated.loc[by.sort_values().index].reset_index(drop=True)
    return Table(_LEVEL_COLUMNS, frame, group="phase")


def controls(summary: pd.DataFrame) -> Table:
    """Every control beside the configs that it questions, from a benchmark's summary."""
    names = list(summary["strategy"])
    asks = [name.partition("@")[0] for name in names]
    twins = {asked for asked, name in zip(asks, names, strict=True) if asked != name}
    is_shown = [kind(n) == "control" or a in twins for n, a in zip(names, asks, strict=True)]
    places = [names.index(asked) if asked in names else index for index, asked in enumerate(asks)]
    # A shuffled config follows the one that it questions, where that was measured.
    frame = summary.assign(asks=asks, place=places)[is_shown].sort_values("place", kind="stable")
    return Table(_CONTROL_COLUMNS, frame.reset_index(drop=True), group="asks")


def depths(rates: pd.DataFrame) -> Table:
    """A row a phase and config, a column a depth, from ``clock.depth_table``."""
    numbers = [name for name in rates.columns if name not in ("phase", "strategy")]
    columns = (
        Column("strategy", "config"),
        Column("phase", "drafted in"),
        *(Column(name, name, "{:.0%}") for name in numbers),
    )
    return Table(columns, rates.assign(kind=rates["strategy"].map(kind)), group="phase")


def headline(measured: pd.DataFrame, evaluated: pd.DataFrame) -> dict[str, str]:
    """The fastest config that drafts and the longest drafts of either phase: caption -> value."""
    found = {}
    if len(measured):
        drafted = measured[~measured["strategy"].map(kind).isin(["plain", "control"])]
        best = drafted.sort_values("speedup").iloc[-1] if len(drafted) else measured.iloc[0]
        found[f"measured speedup of {best['strategy']}"] = f"{best['speedup']:.2f}{TIMES}"
    for phase, text in (("gap", "drafts accepted in a row"), ("decode", "tokens a verifier call")):
        phases = evaluated["level"].map(lambda name: level(base_level(name)).phase)
        rivals = evaluated[phases == phase].dropna(subset="accept_length")
        if len(rivals):
            best = rivals.sort_values("accept_length").iloc[-1]
            found[f"{text}: {best['level']}, offline"] = f"{best['accept_length']:.2f}"
    return found


def _verdict(row: pd.Series[Any]) -> str:
    if row["lossless"] is None:
        return "-"
    if not row["lossless"]:
        return f"no: {row['num_different'] - row['num_near_ties']:.0f} differ"
    return f"yes, {row['num_near_ties']:.0f} near ties" if row["num_near_ties"] > 0 else "yes"
