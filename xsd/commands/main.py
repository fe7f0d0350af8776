"""``main``: every stage in order, from event files to a report, reusing what is already there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.cli import STAGES, main
from xsd.commands.stage import settings
from xsd.commands.workers import workers
from xsd.config import Level
from xsd.errors import XsdError

if TYPE_CHECKING:
    from xsd.tracking.products import Product

HELP = "run all stages in order on one pair"
DEMO = "experiments/demo.yaml"
TWO_PHASE = "L4+L5F,X1+E3"
VARIANTS = ("", "feature", "free")


@dataclass(frozen=True)
class Config:
    """Options of the whole pipeline; each stage's own are in the recipe."""

    pair: str = "tiny"
    """Pair of the catalog."""
    recipe: Path = Path(DEMO)
    """YAML with a section a stage; the demo is a cut of experiments/tiny.yaml."""
    levels: str = "L1,L2,L3,L4,L4:feature,L4:free,L5,L5F,B1,E1,E2,E3,X1,text"
    """Adapters to train; ':feature' trains with the seed's loss, ':free' on free-running pairs."""
    two_phase: str | None = None
    """Gap adapters and heads to evaluate together; null: L4+L5F and X1+E3, where trained."""
    seed: int = 0
    """Seed of every stage that draws."""
    num_workers: int = 2
    """Adapters that are fitted at the same time, each in a process of its own."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise XsdError(f"num_workers={self.num_workers}: must be at least 1")


class _Stages:
    """Stage configurations from the recipe, and the stages' products."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def settings(self, stage: str, **overrides: object) -> Any:
        """The stage's configuration: the recipe's section and what came out of the others."""
        return settings(stage, self.config.recipe, pair=self.config.pair, **overrides)

    def perform(self, stage: str, **overrides: object) -> Product:
        """Run (or reuse) one stage."""
        product: Product = import_module(f"xsd.commands.{stage}").perform(
            self.settings(stage, **overrides)
        )
        return product


def run(config: Config) -> None:
    """Pull every stage; print the two tables and where to look further."""
    from xsd.pairs.catalog import sources
    from xsd.tracking.run import stage_run

    if not config.recipe.is_file():
        raise XsdError(f"{config.recipe}: no such recipe; give one with --recipe")
    names = _names(config.levels)
    both = _two_phase(config.two_phase, names)
    stages = _Stages(config)
    for stage in STAGES:
        if stage != "main":
            # A value that a stage would refuse is found before the first one runs.
            stages.settings(stage)
    # So is a checkpoint that is not named.
    sources(stages.settings("lm_head"))
    values = {name: str(value) for name, value in vars(config).items()}
    with stage_run("main", config.pair, values, tags={"recipe": config.recipe.name}) as parent:
        products = _walk(stages, names, both, parent.run_id)
        tables = f"{_level_table(products)}\n\n{_config_table(products['benchmark'])}"
        parent.tag({"mlflow.note.content": f"```\n{tables}\n```"})
        print(f"\n{tables}")
        _summarise(products, parent.link(), config)


def _names(levels: str) -> list[str]:
    """The adapters to train, by their canonical names; a slip is found before the first stage."""
    names = []
    for text in _items(levels):
        level, _, variant = text.partition(":")
        if variant not in VARIANTS:
            raise XsdError(f"--levels {text}: a level is followed by nothing, :feature or :free")
        names.append(":".join(filter(None, (Level(level), variant))))
    if not names:
        raise XsdError("--levels: names no level to train; leave it out for all")
    return names


def _two_phase(pairs: str | None, names: Sequence[str]) -> list[tuple[str, str]]:
    """Gap adapter and head of every two-phase evaluation."""
    found = []
    for text in _items(TWO_PHASE if pairs is None else pairs):
        gap, _, decode = text.partition("+")
        if {gap, decode} <= set(names):
            found.append((gap, decode))
        elif pairs is not None:
            raise XsdError(f"--two_phase {text}: write GAP+HEAD, both of them among --levels")
    return found


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _walk(
    stages: _Stages, names: list[str], two_phase: Sequence[tuple[str, str]], parent: str
) -> dict[str, Product]:
    found: dict[str, Product] = {}
    with workers(stages.config.num_workers, parent) as pool:
        scenes = stages.perform("scenes")
        head = stages.perform("lm_head")
        data = stages.perform("extract", dataset_dir=scenes.uri)
        fitted: dict[str, Future[tuple[Product, Product]]] = {}

        def fit(variants: Iterable[str], pairs: Product) -> None:
            for name in variants:
                fitted[name] = pool.submit(_fit, stages, name, pairs.uri, head.uri)

        fit((name for name in names if not name.endswith(":free")), data)
        if free := [name for name in names if name.endswith(":free")]:
            conditioning = {"conditioning": "free_running"}
            fit(free, stages.perform("extract", dataset_dir=scenes.uri, **conditioning))
        # In the order of submission; which of two variants of a level is promoted depends on it.
        for name, future in fitted.items():
            trained, found[f"evaluate {name}"] = future.result()
            found[f"train {name}"] = trained
            found[f"promote {name}"] = stages.perform("promote", candidate=trained.uri)
    # What is measured must have the machine to itself: the workers are gone by now.
    for gap, decode in two_phase:
        found[f"two_phase {gap}+{decode}"] = stages.perform(
            "two_phase",
            prefill_checkpoint=found[f"train {gap}"].uri,
            decode_checkpoint=found[f"train {decode}"].uri,
            data=data.uri,
            lm_head=head.uri,
        )
    found["benchmark"] = stages.perform(
        "benchmark", dataset_dir=scenes.uri, data=data.uri, configs=_configs(names)
    )
    runs = ",".join(str(product.run_id) for product in found.values() if product.run_id)
    found["report"] = stages.perform("report", runs=runs)
    return found


def _fit(stages: _Stages, name: str, data: str, head: str) -> tuple[Product, Product]:
    """Train and evaluate one adapter."""
    level, _, variant = name.partition(":")
    given: Mapping[str, Any] = {"loss": "feature"} if variant == "feature" else {}
    trained = stages.perform("train", level=level, data=data, lm_head=head, **given)
    return trained, stages.perform("evaluate", checkpoint=trained.uri, data=data, lm_head=head)


def _configs(names: list[str]) -> str:
    """The benchmark's configs that need no other adapter than those trained."""
    from xsd.decoding.config import ALL_CONFIGS
    from xsd.decoding.strategies import adapter_names, parse

    known = {name for name in names if not name.endswith(":feature")}
    known |= {name.partition(":")[0] for name in names if name.endswith(":feature")}
    return ",".join(name for name in ALL_CONFIGS if set(adapter_names(parse(name, 1))) <= known)


def _summarise(products: Mapping[str, Product], link: str, config: Config) -> None:
    """Below the two tables: the report's path, and how to open the UI."""
    from xsd.tracking import store

    if config.recipe.name == Path(DEMO).name:
        print("\nThis is the demo, a cut of experiments/tiny.yaml: its numbers are a taste only.")
    print(f"\nReport:    {products['report'].path / 'report.html'}")
    print(f"MLflow UI: {store.ui_command()}\n           {link}")


def _level_table(products: Mapping[str, Product]) -> str:
    from xsd.files import read_json

    rows = [("level", "parameters", "cos_sim", "accept@0.90", "token match", "accept length")]
    for name, product in products.items():
        stage, _, variant = name.partition(" ")
        if stage != "evaluate":
            continue
        found = read_json(product.path / "acceptance_metrics.json")
        selected = "of 22" if "accepted_prefix_22" in found else "tau_6"
        rows.append(
            (
                variant,
                f"{found['num_parameters']:,}",
                f"{found['cos_sim_mean']:.3f}",
                f"{found['accept_90']:.1%}",
                f"{found['token_top1_match']:.1%}",
                f"{found['accept_length']:.2f} ({selected})",
            )
        )
    return _aligned(rows)


def _config_table(product: Product) -> str:
    from xsd.files import read_json

    (path,) = product.path.glob("e2e_wallclock_*.json")
    header = ("config", "tokens accepted", "measured speedup", "per sample", "drafting", "lossless")
    rows = [header]
    rows += [
        (
            str(row["strategy"]),
            f"{row['tokens_accepted']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['ratio_mean']:.2f} ± {row['ratio_std']:.2f}",
            f"{row['share_drafting']:.0%}",
            "yes" if row["lossless"] else "NO",
        )
        for row in read_json(path)["summary"]
        if row.get("num_samples", 1)
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    raise SystemExit(main(command="main"))
