"""``report``: one self-contained HTML of levels and configs, from tracked runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.errors import XsdError

if TYPE_CHECKING:
    from dashboards.report import Source
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

HELP = "write levels and configs of tracked runs into one HTML that needs no network"

_STAGES = ("train", "evaluate", "two_phase", "promote", "benchmark")


@dataclass(frozen=True)
class Config(stage.StageConfig):
    """Options of the report stage."""

    pair: str = "tiny"
    """Pair whose runs are reported."""
    runs: str | None = None
    """Comma-separated run ids; null: of every stage and level the newest run of the pair."""
    output_dir: Path = Path("outputs/report")
    """report.html is written here, beside the copy that the run keeps."""


def perform(config: Config) -> Product:
    """Collect, build, write."""

    def resolve() -> dict[str, Product]:
        from dashboards.report import variant
        from xsd.tracking import products

        found = [products.load(f"runs:/{run_id}") for run_id in _run_ids(config)]
        roles = [f"{p.tags['stage']}.{variant(p.tags)}".strip(".") for p in found]
        # The later of two that play one role counts.
        return dict(zip(roles, found, strict=True))

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        from dashboards.report import build
        from xsd.files import write_text

        path = config.output_dir / "report.html"
        html = build(_sources(list(inputs.values())), config.pair, _recipes(inputs))
        write_text(path, html)
        run.artifact(path)
        run.say(f"report: {len(inputs)} runs of {config.pair}: {path}")

    return stage.perform("report", config, resolve=resolve, rooms=["plots", "speedup"], work=work)


def _run_ids(config: Config) -> list[str]:
    """The ids given, or the newest of every stage and variant; the newest last."""
    from dashboards.report import variant
    from xsd.tracking import products, query

    if config.runs is not None:
        named = [text.strip() for text in config.runs.split(",") if text.strip()]
        if not named:
            raise XsdError("runs: names no run; give run ids with commas between them, or null")
        return named
    newest: dict[tuple[str, str], str] = {}
    for name in _STAGES:
        for run_id in query.runs(name, config.pair)["run_id"]:
            key = (name, variant(products.load(f"runs:/{run_id}").tags))
            newest.setdefault(key, run_id)
    if not newest:
        raise XsdError(f"no finished runs of pair {config.pair!r} to report; run 'xsd main' first")
    return list(newest.values())


def _sources(found: Sequence[Product]) -> list[Source]:
    """Runs as the report reads them."""
    from dashboards.report import Source, variant
    from xsd.tracking import query

    ids = [str(product.run_id) for product in found]
    rows = query.runs(run_ids=ids).to_dict("records")
    sources = []
    for run_id, product, row in zip(ids, found, rows, strict=True):
        curve = None
        if product.tags["stage"] == "train":
            points = query.history([run_id], ["val.accept_length"])
            curve = points.drop_duplicates("step").sort_values("step")[["step", "value"]]
        metrics = {str(k): v for k, v in row.items() if isinstance(v, float) and v == v}
        sources.append(
            Source(
                run_id=run_id,
                stage=product.tags["stage"],
                name=variant(product.tags),
                tags=product.tags,
                metrics=metrics,
                folder=product.path,
                curve=curve,
            )
        )
    return sources


def _recipes(inputs: Mapping[str, Product]) -> set[str]:
    """Recipes of the runs of ``main`` that the inputs belong to."""
    from xsd.tracking import products

    parents = {product.tags.get("mlflow.parentRunId") for product in inputs.values()}
    tags = [products.load(f"runs:/{parent}").tags for parent in parents if parent]
    return {one["recipe"] for one in tags if "recipe" in one}


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="report"))
