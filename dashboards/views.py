"""The pages of the live dashboard: runs -> plots -> parts. No arithmetic here."""

from __future__ import annotations

from typing import Any

import pandas as pd
from dash import html

from dashboards import archive, parts, tables
from dashboards.parts import Order, Part
from dashboards.tables import Column, Table
from xsd.config import variant
from xsd.errors import XsdError
from xsd.plots import clock, learning, offline, overview, sweep, timeline, upkeep
from xsd.plots.overview import Cost
from xsd.tracking.store import run_link

TRIAL_COLUMNS = (
    Column("number", "trial"),
    Column("state", "state"),
    Column("accept_length", "accept length", "{:.3f}"),
    Column("latency_ms", "ms a token", "{:.3f}"),
    Column("num_epochs", "epochs"),
    Column("seconds", "seconds", "{:.1f}"),
)
FAILURE_COLUMNS = (
    Column("name", "run"),
    Column("status", "status"),
    Column("started", "began", "{:%Y-%m-%d %H:%M}"),
    Column("num_failures", "samples lost", "{:.0f}"),
    Column("reason", "reason"),
)
HEAVY_COLUMNS = (
    Column("name", "run"),
    Column("stage", "stage"),
    Column("size", "files"),
    Column("started", "began", "{:%Y-%m-%d %H:%M}"),
)
STAGE_COLUMNS = (
    Column("stage", "stage"),
    Column("size", "files"),
    Column("num_runs", "runs"),
    Column("num_unknown", "of unknown size"),
)
_NUM_HEAVY = 15


def links(frame: pd.DataFrame, ui: str | None) -> dict[str, str]:
    """Run id -> its page in the MLflow UI."""
    both = zip(frame["experiment_id"], frame["run_id"], strict=True)
    return {str(run): run_link(str(experiment), str(run), ui) for experiment, run in both}


def at_a_glance(frame: pd.DataFrame, order: Order, ui: str | None) -> Part:
    """Leaderboards of configs and levels, and whether the model agrees with the clock."""
    measured, levels = overview.configs_frame(frame), _levels(frame)
    configs = overview.newest(measured, "strategy")
    if configs.empty and levels.empty:
        return parts.empty(
            "No benchmark and no evaluation among these runs: 'xsd main' makes both."
        )
    pages = links(frame, ui)
    tiles = {"runs": f"{len(frame):,}", **tables.headline(configs, levels)}
    if len(configs):
        kept = f"{configs['lossless'].sum()} of {len(configs)}"
        tiles["configs that keep every answer"] = kept
    found: list[Part] = [parts.tiles(tiles)]
    if len(configs):
        note = (
            "Of every config the newest measurement. Blue drafts in the prefill gap, amber in "
            "decode, green in both; violet are controls. A heading sorts, a name opens its run."
        )
        fastest_first = order if order.table == "configs" else Order("configs", "speedup")
        shown = parts.table("configs", tables.configs(configs), fastest_first, pages)
        found.append(parts.card("Configs, measured", shown, note=note))
    if len(levels):
        note = (
            "Of every level the newest evaluation, on held-out recordings; modelled speedups rest "
            "on assumed costs."
        )
        shown = parts.table("levels", tables.levels(levels), order, pages)
        found.append(parts.card("Levels, offline", shown, note=note))
    agreed = overview.agreement_frame(measured, frame)
    if len(agreed):
        found.append(parts.graph(overview.agreement(agreed)))
    if measured["run_id"].nunique() > 1:
        found.append(parts.graph(overview.progress(measured)))
    return html.Div(found)


def _levels(frame: pd.DataFrame) -> pd.DataFrame:
    """The newest evaluation of every level, in the order of their table."""
    return tables.levels(overview.newest(overview.levels_frame(frame), "level")).frame


def of_levels(frame: pd.DataFrame, cost: Cost) -> Part:
    """Where drafts are accepted, what that costs, and whether features tell."""
    evaluated = archive.newest_of(frame, "evaluate")
    order = [name for name in _levels(frame)["level"] if name in evaluated]
    if not order:
        return parts.empty("No evaluation among these runs: 'xsd evaluate' makes one.")
    positions = {name: archive.positions(evaluated[name]["run_id"]) for name in order}
    positions = {name: rows for name, rows in positions.items() if rows}
    trained = archive.newest_of(frame, "train")
    curves = {name: archive.curve(trained[name]["run_id"]) for name in order if name in trained}
    curves = {name: curve for name, curve in curves.items() if len(curve)}
    rates = {name: archive.numbers(evaluated[name]) for name in order}
    ranks = offline.feature_against_tokens(rates)
    costs = overview.cost_frame(_levels(frame), overview.configs_frame(frame), cost)
    return html.Div(
        [
            parts.graph(overview.cost_against_acceptance(costs, cost))
            if len(costs)
            else parts.empty("None of these levels was timed: 'xsd benchmark' does it."),
            parts.graph(offline.acceptance_by_position(positions)) if positions else None,
            parts.graph(ranks) if ranks is not None else None,
            parts.graph(learning.curves_comparison(curves)) if curves else None,
        ]
    )


def of_speed(run_id: str, order: Order) -> Part:
    """One benchmark: speedups with their spread, where time goes, what was accepted, controls."""
    try:
        found = archive.bench(run_id)
    except XsdError as error:
        return parts.empty(str(error))
    controls = tables.controls(found.summary)
    depths = tables.depths(clock.depth_table(found.traces))
    note = (
        f"{found.summary['num_samples'].max():.0f} samples, every config on each of them, "
        "interleaved. The clock runs from decoded media in host memory to the last token; decoding "
        f"the files takes {found.media_ms_mean:.1f} ms more, the same for all."
    )
    return html.Div(
        [
            html.P(note, className="soft"),
            parts.graph(clock.speedup_comparison(found.traces)),
            parts.graph(clock.timing_breakdown(found.traces)),
            parts.graph(clock.accept_rate_comparison(found.traces)),
            parts.graph(clock.accept_rate_by_depth(found.traces)),
            parts.card("Accept rate by position, in numbers", parts.table("depths", depths, order))
            if len(depths.frame)
            else None,
            parts.card(
                "Controls",
                parts.table("controls", controls, order),
                note=tables.CONTROLS_NOTE,
            )
            if len(controls.frame)
            else None,
        ]
    )


def of_sample(row: dict[str, Any], strategy: str, sample_key: str) -> Part:
    """One answer on the clock, in words, and in what both models saw."""
    try:
        found = archive.example(row, strategy, sample_key)
    except XsdError as error:
        return parts.empty(str(error))
    if found is None:
        return parts.empty(f"{strategy} has no answer for {sample_key}: it failed there.")
    seen = [
        parts.pictures(title, images)
        for title, images in (
            ("what the drafter sees: events", found.event_images),
            ("what the verifier sees: frames", found.frames),
        )
        if images
    ]
    away = "The clip's files are not within reach of this machine."
    return html.Div(
        [
            parts.card("The scene", *(seen or [parts.empty(away)]), note=sample_key),
            parts.graph(timeline.lanes(found)),
            parts.card("The answer", parts.answer(found), note=f"{strategy}, token by token"),
        ]
    )


def of_sweep(row: dict[str, Any], order: Order, ui: str | None) -> Part:
    """One search: its trials, what they gained, and what mattered."""
    try:
        trials = archive.trials(row["run_id"])
    except XsdError as error:
        return parts.empty(str(error))
    shares = archive.importance(row["run_id"])
    known = {column.key for column in TRIAL_COLUMNS} | {"on_front", "run", "reason"}
    parameters = [name for name in trials.columns if name not in known]
    columns = [column for column in TRIAL_COLUMNS if column.key in trials]
    columns += [
        Column(name, name, "{:.4g}" if _is_float(trials[name]) else "{}") for name in parameters
    ]
    shown = trials.assign(run_id=trials["run"].str.removeprefix("runs:/"))
    pages = {run: run_link(row["experiment_id"], run, ui) for run in shown["run_id"] if run}
    complete = trials[trials["state"] == "complete"]
    return html.Div(
        [
            parts.graph(sweep.history(trials)),
            parts.graph(sweep.pareto(trials)) if "latency_ms" in trials else None,
            parts.graph(sweep.importance(shares)) if len(shares) else None,
            parts.graph(sweep.parallel_coordinates(trials, parameters)) if len(complete) else None,
            parts.card("Trials", parts.table("trials", Table(tuple(columns), shown), order, pages)),
        ]
    )


def _is_float(values: pd.Series[Any]) -> bool:
    return bool(pd.api.types.is_float_dtype(values))


def of_upkeep(
    frame: pd.DataFrame, num_bytes: pd.Series[float], order: Order, ui: str | None
) -> Part:
    """What runs weigh, and what went wrong."""
    if frame.empty:
        return parts.empty("No runs here.")
    pages = links(frame, ui)
    stages = upkeep.storage_frame(frame, num_bytes)
    stages = stages.assign(size=stages["num_bytes"].map(upkeep.size_text))
    heavy = frame.assign(num_bytes=num_bytes).nlargest(_NUM_HEAVY, "num_bytes")
    heavy = heavy.assign(size=heavy["num_bytes"].map(upkeep.size_text))
    failed = upkeep.failures_frame(frame)
    lost = (
        parts.table("failures", Table(FAILURE_COLUMNS, failed), order, pages)
        if len(failed)
        else parts.empty("No run failed, and none lost a sample.")
    )
    return html.Div(
        [
            parts.card(
                "Failures",
                lost,
                note="Runs that failed or were killed, and runs that lost samples.",
            ),
            parts.graph(upkeep.outcomes(upkeep.outcomes_frame(frame))),
            parts.graph(upkeep.storage(stages)),
            parts.card(
                "Storage by stage", parts.table("stages", Table(STAGE_COLUMNS, stages), order)
            ),
            parts.card(
                "The heaviest runs",
                parts.table("heavy", Table(HEAVY_COLUMNS, heavy), order, pages),
                note="A file that several runs link is on disk once; 'xsd gc' lists what can go.",
            ),
        ]
    )


def title_of(row: dict[str, Any]) -> str:
    """A run in a list: when, what, and its first id digits."""
    name = variant(row["tags"]) or row["stage"]
    return f"{row['started']:%d %b %H:%M}  {name}  {row['run_id'][:8]}"
