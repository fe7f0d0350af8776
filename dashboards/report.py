"""The report: levels and configs side by side, from the runs that measured them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from dashboards import page, tables
from dashboards.tables import Table
from xsd.config import variant as variant
from xsd.files import read_json
from xsd.plots import clock, learning, offline, overview, timeline
from xsd.plots.style import TIMES, kind
from xsd.types import Trace

DEMO = "demo.yaml"
_DASH = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """A finished run, as the report reads it."""

    run_id: str
    stage: str
    name: str
    """Its level, with what sets it apart: ``L4``, ``L4:feature``, ``L4:free``, ``X1+E3``."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    folder: Path
    """Its artifacts."""
    curve: pd.DataFrame | None = None
    """Training only: validation accept length, columns step and value."""


def build(sources: Sequence[Source], pair: str, recipes: Iterable[str] = ()) -> str:
    """The whole page as HTML.

    Args:
        sources: the newest last; of two of a stage and name the later one counts.
        recipes: names of the recipes that the runs were made by.
    """
    by_stage: dict[str, dict[str, Source]] = {}
    for source in sources:
        by_stage.setdefault(source.stage, {})[source.name] = source
    evaluated = by_stage.get("evaluate", {})
    levels = tables.levels(_levels_frame(evaluated.values()))
    # As the table has them.
    evaluated = {name: evaluated[name] for name in levels.frame["level"]}
    bench = next(iter(by_stage.get("benchmark", {}).values()), None)
    files = read_json(_newest(bench.folder, "e2e_wallclock_*.json")) if bench else None
    traces = [timeline.trace_from(values) for values in files["traces"]] if files else []
    summary = pd.DataFrame(files["summary"]) if files else pd.DataFrame()
    sections = [
        _configs(files, summary, traces),
        _hiding(bench, traces),
        _levels(levels, evaluated, by_stage.get("train", {})),
        _controls(summary),
        _leakage(evaluated),
        _two_phase(by_stage.get("two_phase", {})),
        _promotions(by_stage.get("promote", {})),
    ]
    made = datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    runs = ", ".join(f"{s.stage} {s.name} {s.run_id[:8]}".replace("  ", " ") for s in sources)
    return page.page(
        f"Cross-modal speculative decoding: {pair}",
        _lead(summary, levels.frame, DEMO in set(recipes)),
        sections,
        footer=f"Made {made} from the runs {runs}.",
    )


def _lead(summary: pd.DataFrame, levels: pd.DataFrame, is_demo: bool) -> str:
    text = (
        "A drafter that sees events guesses what a verifier that sees video will say; adapters and "
        "heads turn states into guesses, and the verifier checks them. Its answer never changes, "
        "only the time it takes."
    )
    parts = [page.paragraph(text)]
    if is_demo:
        parts.append(
            page.paragraph(
                "These runs are the demo, a cut of experiments/tiny.yaml: fewer scenes, epochs and "
                "samples. Its numbers are a taste, not results.",
                "note",
            )
        )
    return "".join([*parts, page.tiles(_headline(summary, levels))])


def _headline(summary: pd.DataFrame, levels: pd.DataFrame) -> dict[str, str]:
    tiles = tables.headline(summary, levels)
    if len(summary):
        changed = summary["num_different"].sum() - summary["num_near_ties"].sum()
        tiles["answers changed by speculation"] = f"{changed:.0f}"
        tiles["samples, plain and by every config"] = f"{summary['num_samples'].max():.0f}"
    return tiles


def _levels_frame(evaluated: Iterable[Source]) -> pd.DataFrame:
    about = {"experiment_id": None, "started": None}
    rows = [
        {**about, "run_id": one.run_id, "stage": one.stage, "tags": one.tags, **one.metrics}
        for one in evaluated
    ]
    return overview.levels_frame(pd.DataFrame(rows, columns=None if rows else ["stage"]))


def _configs(files: Any, summary: pd.DataFrame, traces: Sequence[Trace]) -> str:
    if not traces:
        return ""
    media = files["media_ms_mean"]
    note = (
        f"{summary['num_samples'].max():.0f} samples, every config on each of them, interleaved. "
        "The clock runs from decoded frames and event images in host memory to the last token, "
        "with processors, vision towers, both prefills and every wait. Speedups are pooled: sum of "
        "times over sum; modelled ones come from costs measured beforehand and the counts that "
        "occurred. Time p95: 95th percentile of a sample's time over plain decoding's. "
        "Drafting: share of answers in which the policy let any draft be verified; a config that "
        f"rests is plain decoding.{clock.noise(summary)} Decoding the media files takes "
        f"{media:.1f} ms more, the same for all."
    )
    rates = clock.depth_table(traces)
    return page.section(
        "Configs, measured",
        page.paragraph(note, "soft"),
        _table(tables.configs(summary)),
        page.figure(clock.speedup_comparison(traces)),
        page.figure(clock.timing_breakdown(traces)),
        page.figure(clock.accept_rate_comparison(traces)),
        page.figure(clock.accept_rate_by_depth(traces)),
        _table(tables.depths(rates)) if len(rates) else "",
    )


def _hiding(bench: Source | None, traces: Sequence[Trace]) -> str:
    if bench is None or not (bench.folder / "example.json").is_file():
        return ""
    example = timeline.Example.from_dict(read_json(bench.folder / "example.json"))
    return page.section(
        "One answer, on the clock",
        page.paragraph(
            "While the verifier still reads the video, the drafter has read the events and drafts. "
            "The verifier checks what is ready in one pass, and never waits for another draft.",
            "soft",
        ),
        page.figure(timeline.prefill_hiding(example, traces)),
    )


def _levels(levels: Table, evaluated: Mapping[str, Source], trained: Mapping[str, Source]) -> str:
    if not evaluated:
        return ""
    positions = {
        name: read_json(source.folder / "position_stats.json")["target"]
        for name, source in evaluated.items()
    }
    curves = {
        name: curve
        for name in evaluated
        if name in trained and (curve := trained[name].curve) is not None
    }
    note = (
        "Offline, on held-out recordings, next token against next token. Accept length is what "
        "selects: for levels of the gap (above the line) drafts that match before the first miss, "
        "of 22; for heads (below) tokens a verifier call with six drafts. The modelled speedup "
        "rests on assumed costs, not on a clock. ':feature' was trained on states, ':free' on "
        "pairs whose models spoke freely."
    )
    return page.section(
        "Levels, offline",
        page.paragraph(note, "soft"),
        _table(levels),
        page.figure(offline.acceptance_by_position(positions)),
        page.figure(offline.feature_against_tokens({n: s.metrics for n, s in evaluated.items()})),
        page.figure(learning.curves_comparison(curves) if curves else None),
    )


def _controls(summary: pd.DataFrame) -> str:
    """Every control beside the configs that it questions."""
    if summary.empty or "control" not in set(summary["strategy"].map(kind)):
        return ""
    note = page.paragraph(tables.CONTROLS_NOTE, "soft")
    return page.section("Controls", note, _table(tables.controls(summary)))


def _leakage(evaluated: Mapping[str, Source]) -> str:
    rows = [
        [
            name,
            f"{source.metrics['same_position.accept_90']:.1%}",
            f"{source.metrics['accept_90']:.1%}",
            f"{source.metrics['token_top1_match']:.1%}",
        ]
        for name, source in evaluated.items()
        if "same_position.accept_90" in source.metrics
    ]
    note = (
        "L5, B1 and L5F were once scored at a position whose state B1 and L5F read: an identity "
        "map would score 100%. Kept for comparison; nothing else in this report uses it."
    )
    columns = ["level", "accept@0.90, same position", "accept@0.90, next", "token match, next"]
    shown = (page.paragraph(note, "soft"), page.table(columns, rows)) if rows else ()
    return page.section("Same position: leakage", *shown)


def _two_phase(sources: Mapping[str, Source]) -> str:
    rows = [
        [
            name,
            f"{source.metrics['phase1.accepted']:.2f}",
            f"{source.metrics['modelled.tau']:.2f}",
            *(
                f"{source.metrics[f'modelled.{key}']:.2f}{TIMES}"
                for key in ("gap_only_speedup", "decode_only_speedup", "speedup_e2e")
            ),
        ]
        for name, source in sources.items()
    ]
    columns = ["levels", "accepted in the gap", "tau after it", "gap alone", "head alone", "both"]
    note = "Offline: the head starts where the gap's drafts end. Speedups are modelled."
    shown = (page.paragraph(note, "soft"), page.table(columns, rows)) if rows else ()
    return page.section("Two phases, modelled", *shown)


def _promotions(sources: Mapping[str, Source]) -> str:
    rows = [
        [
            name,
            "yes" if source.tags.get("promoted") == "true" else "no",
            _text(source.metrics.get("candidate"), "{:.3f}"),
            _text(source.metrics.get("incumbent"), "{:.3f}"),
            source.tags.get("reasons", ""),
        ]
        for name, source in sources.items()
    ]
    columns = ["candidate", "promoted", "its accept length", "incumbent's", "reasons against it"]
    return page.section("Champions", *((page.table(columns, rows),) if rows else ()))


def _table(made: Table) -> str:
    columns = made.shown()
    rows = [
        [column.text(row[column.key]) for column in columns]
        for row in made.frame.to_dict("records")
    ]
    return page.table([column.title for column in columns], rows, breaks=made.breaks())


def _text(value: float | None, pattern: str) -> str:
    return _DASH if value is None or pd.isna(value) else pattern.format(value)


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.name)
