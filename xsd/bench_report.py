"""Traces to what people read: the table, the example, the files, the logged numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pandas as pd

from xsd import speedup
from xsd.bench import BenchItem, Failure
from xsd.decoding.config import BASELINE, GAP_LEVELS, HEAD_LEVELS
from xsd.decoding.decoded import PARTS
from xsd.decoding.strategies import metric_name
from xsd.files import write_json, write_text
from xsd.pairs.base import ModelPair
from xsd.plots import clock, timeline
from xsd.plots.style import kind
from xsd.plots.timeline import Example, data_uri
from xsd.types import Trace

if TYPE_CHECKING:
    from xsd.tracking.run import Run

_FIRST = (
    *("strategy", "speedup", "lossless", "tokens_accepted", "tau", "share_drafting"),
    *("prefill_ms", "decode_ms", "total_ms"),
)
"""Columns that a reader of the table in the UI sees without scrolling."""


def write(
    run: Run,
    records: Sequence[Trace | Failure],
    items: Sequence[BenchItem],
    pair: ModelPair,
    config: Any,
    strict_rows: int | None = None,
) -> None:
    """Per-sample JSON, the table, five plots; and all of it into the run.

    ``strict_rows``: of every pass of decoding, if they had one shape.
    """
    traces = [record for record in records if isinstance(record, Trace)]
    failures = [record for record in records if isinstance(record, Failure)]
    folder = config.output_dir / run.work_name
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    num_attempted = len(items)
    # Of a config that failed on every sample there is no trace, but a row.
    names = [record.strategy for record in records]
    summary = speedup.measured(traces, num_attempted=num_attempted, strategies=names)
    text = table(summary, traces, items, is_drawn=config.temperature > 0, strict_rows=strict_rows)
    print(text)
    write_json(
        folder / f"e2e_wallclock_{stamp}.json",
        {
            "config": {name: str(value) for name, value in asdict(config).items()},
            "media_ms_mean": sum(item.media_ms for item in items) / len(items),
            "summary": json.loads(summary.to_json(orient="records")),
            "traces": [asdict(trace) for trace in traces],
            "pieces": pieces(traces, pair),
            "failures": [asdict(failure) for failure in failures],
        },
    )
    write_text(folder / f"e2e_wallclock_{stamp}.md", text + "\n")
    run.tag({"mlflow.note.content": f"{_headline(summary)}\n\n{text}"})
    run.artifacts(folder)
    figures = {
        f"speedup_comparison_{stamp}": clock.speedup_comparison(traces),
        f"timing_breakdown_{stamp}": clock.timing_breakdown(traces),
        f"accept_rate_comparison_{stamp}": clock.accept_rate_comparison(traces),
        f"accept_rate_by_depth_{stamp}": clock.accept_rate_by_depth(traces),
    }
    # A batch's time is no sample's, so there is no one sample's timeline to show.
    shown = example(traces, items, pair) if config.batch_size == 1 else None
    if shown is not None:
        write_json(folder / "example.json", shown.as_dict())
        run.artifact(folder / "example.json")
        figures[f"prefill_hiding_{stamp}"] = timeline.prefill_hiding(shown, traces)
    run.figures(figures, folder)
    first = [name for name in _FIRST if name in summary]
    run.table("benchmark", summary[[*first, *summary.columns.difference(first, sort=False)]])
    run.table("per_sample", speedup.per_sample(traces))
    run.table("breakdown", speedup.breakdown(traces))
    run.table("traces", traces_frame(traces))
    run.log(metrics(summary))
    num_failures = len({failure.sample_key for failure in failures})
    run.tag({"lossless": _lossless(summary), "num_failures": num_failures})
    if strict_rows is not None:
        run.tag({"strict_rows": strict_rows})


def traces_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """A row a trace, in the order of decoding, without its timeline; ids as text."""
    rows = []
    for trace in traces:
        row = asdict(trace)
        del row["timeline"], row["parts"], row["batch"], row["batch_size"], row["alone_ms"]
        row["beside_ms"] = row.pop("beside").get("total_ms")
        for name in ("token_ids", "cycle_drafted", "cycle_accepted"):
            row[name] = " ".join(str(number) for number in row[name])
        rows.append(row)
    return pd.DataFrame(rows)


def example(traces: Sequence[Trace], items: Sequence[BenchItem], pair: ModelPair) -> Example | None:
    """The sample in which the gap's drafts (else a head's) held the longest."""
    learned = {*GAP_LEVELS, *HEAD_LEVELS}
    plain_traces = {(t.sample_key, t.repeat): t for t in traces if t.strategy == BASELINE}
    drafted = [
        trace
        for trace in traces
        if trace.lossless
        and (trace.sample_key, trace.repeat) in plain_traces
        and learned & {*re.split(r"[+_:]", trace.strategy.split("@")[0])}
    ]
    if not drafted:
        return None
    fast = max(
        drafted, key=lambda t: (bool(t.gap_accepted), t.gap_accepted + sum(t.cycle_accepted))
    )
    plain = plain_traces[fast.sample_key, fast.repeat]
    media = next(item.media for item in items if item.sample.key == fast.sample_key)
    texts = pieces([fast], pair)
    return Example(
        plain,
        fast,
        tuple(texts[str(token)] for token in fast.token_ids),
        tuple(data_uri(image) for image in media.event_images),
        tuple(data_uri(frame) for frame in media.frames),
    )


def pieces(traces: Sequence[Trace], pair: ModelPair) -> dict[str, str]:
    """Text of every token that was said, spaces included, by its id as JSON writes keys."""
    ids = sorted({token for trace in traces for token in trace.token_ids})
    tokens = pair.verifier.tokenizer.convert_ids_to_tokens(ids)
    return {str(i): token.replace("▁", " ") for i, token in zip(ids, tokens, strict=True)}


def metrics(summary: pd.DataFrame) -> dict[str, float]:
    """``measured.<config>.<quantity>`` and ``modelled.<config>.speedup``; MLflow refuses some
    characters of config names."""
    kept = ("speedup", "decode_speedup", "speedup_alone", "tokens_per_s", "ratio_mean",
            "ratio_p5", "ratio_p95", "time_p95", "share_slower", "share_drafting",
            "prefill_ms", "decode_ms", "total_ms", "tokens_accepted",
             "tau", "num_free", "num_samples", "num_failed", "num_different",
             "num_near_ties")  # fmt: skip
    found: dict[str, float] = {}
    for _, row in summary.iterrows():
        name = metric_name(str(row["strategy"]))
        found |= {f"measured.{name}.{key}": float(row[key]) for key in kept if row[key] == row[key]}
        if row["modelled_speedup"] == row["modelled_speedup"]:
            found[f"modelled.{name}.speedup"] = float(row["modelled_speedup"])
    return found


def table(
    summary: pd.DataFrame,
    traces: Sequence[Trace],
    items: Sequence[BenchItem],
    *,
    is_drawn: bool = False,
    strict_rows: int | None = None,
) -> str:
    """The seed's columns, with spread and losslessness, as Markdown.

    ``is_drawn``: tokens were sampled, so that no two answers need be equal. ``strict_rows``: of
    every pass of decoding, if they had one shape.
    """
    has_failed = bool(summary["num_failed"].any())
    header: tuple[str, ...] = (
        "Config", *(("Samples",) if has_failed else ()), "Prefill", "Decode", "Total", "Accept",
        "Accepted", "Tau", "Speedup", "Modelled", "Per sample (mean ± sd)", "Time p95", "Slower",
        "Drafting", "Free Tokens", "Lossless",
    )  # fmt: skip
    size = max(trace.batch_size for trace in traces)
    if size > 1:
        header = (*header, "Tokens/s", "Against one by one")
    rows = [
        (
            row["strategy"],
            *((f"{row['num_samples']} of {len(items)}",) if has_failed else ()),
            *(_or_dash(row[name], "{:.1f} ms") for name in ("prefill_ms", "decode_ms", "total_ms")),
            _or_dash(row["accept_rate"], "{:.1%}"),
            _or_dash(row["tokens_accepted"], "{:.1f}"),
            _or_dash(row["tau"], "{:.2f}"),
            _or_dash(row["speedup"], "{:.2f}x"),
            _or_dash(row["modelled_speedup"], "{:.2f}x"),
            _or_dash(row["ratio_mean"], f"{{:.2f}} ± {row['ratio_std']:.2f}"),
            _or_dash(row["time_p95"], "{:.2f}"),
            _or_dash(row["share_slower"], "{:.0%}"),
            _or_dash(row["share_drafting"], "{:.0%}"),
            f"{row['num_free']:.1f}" if row["num_free"] > 0 else "-",
            "in distribution" if is_drawn and row["num_samples"] else _verdict(row),
            *(
                _or_dash(row[name], form)
                for name, form in (("tokens_per_s", "{:.0f}"), ("speedup_alone", "{:.2f}x"))
                if size > 1
            ),
        )
        for _, row in summary.iterrows()
    ]
    media_ms = sum(item.media_ms for item in items) / len(items)
    note = (
        f"{len(items)} samples, median of {1 + max(t.repeat for t in traces)} interleaved repeats; "
        f"speedup pooled (sum over sum). The clock starts with decoded media; decoding the files "
        f"takes {media_ms:.1f} ms more, the same for every config. Modelled: what passes and "
        "drafts cost, times how many of them the answers had; what a drafter slows that runs "
        "beside the prefill is not in it. Time p95: 95th "
        "percentile of a sample's time over plain decoding's; drafting: share of answers in which "
        f"the policy let any draft be verified.{clock.noise(summary)} The second table has means, "
        "not medians, so its parts add up."
    )
    if has_failed:
        note += (
            " Samples: on which neither the config nor plain decoding failed in any repeat; a "
            "row, in either table, is of these alone, on both sides of its ratios."
        )
    if strict_rows is not None:
        note += (
            f" Strict: every pass of decoding, plain or not, has {strict_rows} rows, so a speedup "
            "is one over plain decoding at that shape, which is slower; any difference counts."
        )
    if size > 1:
        num_batches = len({trace.batch for trace in traces})
        note += (
            f" Batch size {size}: {num_batches} batches, {len(items) / num_batches:.1f} questions "
            "each. Times are a batch's, the speedup is over plain decoding of the same batch, and "
            "the last column over plain decoding of its questions one by one."
        )
    return "\n\n".join([_markdown(header, rows), note, _markdown(*_parts(traces))])


def _parts(traces: Sequence[Trace]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Where the time of an answer goes; the parts of a row sum to its last cell."""
    frame = speedup.breakdown(traces)
    table = frame.pivot(index="strategy", columns="part", values="ms").fillna(0.0)
    parts = [part for part in ("prefill", "decode", *PARTS) if part in table.columns]
    rows = [
        (
            name,
            *(f"{table.loc[name, part]:z.2f}" for part in parts),
            f"{table.loc[name].sum():z.2f}",
        )
        for name in frame["strategy"].drop_duplicates()
    ]
    return ("Milliseconds an answer", *parts, "sum"), rows


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _headline(summary: pd.DataFrame) -> str:
    """What a reader of the run wants to know first."""
    drafted = summary[summary["strategy"] != BASELINE]
    num_lossless = sum(map(bool, drafted["lossless"]))
    kept = f"{num_lossless} of {len(drafted)} configs keep every answer"
    learned = drafted[drafted["strategy"].map(lambda name: kind(str(name)) != "control")]
    learned = learned[learned["num_samples"] > 0]
    if learned.empty:
        return f"benchmark: {kept}."
    best = max(learned.to_dict("records"), key=lambda row: float(row["speedup"]))
    return f"benchmark: {best['strategy']} is {best['speedup']:.2f}x plain decoding; {kept}."


def _lossless(summary: pd.DataFrame) -> str:
    """Of all configs together; one that no sample is left of could be either."""
    told = summary["lossless"].dropna()
    if not told.all():
        return "false"
    return "true" if len(told) == len(summary) else "unknown"


def _verdict(row: pd.Series[Any]) -> str:
    """Whether nothing changed that rounding does not excuse."""
    if row["lossless"] is None:
        return "-"
    ties = int(row["num_near_ties"])
    if not row["lossless"]:
        return f"NO ({int(row['num_different']) - ties} differ)"
    return f"yes ({ties} near ties)" if ties else "yes"


def _or_dash(value: float, form: str) -> str:
    return form.format(value) if value == value else "-"
