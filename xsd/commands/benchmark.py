"""``benchmark``: wall-clock time of speculative configs against plain decoding, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.bench_config import BenchConfig
from xsd.cli import main
from xsd.commands import stage
from xsd.commands.progress import progress
from xsd.errors import XsdError
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.bench import Failure
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.types import Strategy, Trace

HELP = "measure speculative decoding end to end against plain decoding"


@dataclass(frozen=True)
class Config(BenchConfig, PairConfig, stage.StageConfig):
    """Options of the benchmark stage."""

    dataset_dir: str | None = None
    """Scenes: folder or runs:/ URI; null: the newest of the pair, made if there are none."""
    data: str | None = None
    """Extraction whose training answers the controls template and ngram know; null: the newest."""
    adapter_dir: str | None = None
    """Folder with a subfolder a level: a checkpoint, or trainings of which the newest counts; null:
    the registry's champions."""
    output_dir: Path = Path("outputs/benchmark")
    """Where the result files are written."""


def perform(config: Config) -> Product:
    """Measure, compare, write the files, and log them."""
    from xsd.decoding.strategies import adapter_names, parse_all, strict_rows
    from xsd.pairs.catalog import sources

    # The pair first: a checkpoint that is not named must not cost the making of scenes.
    sources(config)
    strategies = parse_all(config.configs, config.gamma, config.control)
    if config.batch_size > 1:
        strategies = _batchable(strategies, config.batch_size)
    names = dict.fromkeys(name for s in strategies for name in adapter_names(s))
    needs_answers = {part for s in strategies for part in (s.gap, s.head)} & {"template", "ngram"}

    def resolve() -> dict[str, Product]:
        inputs = {"dataset_dir": stage.upstream("scenes", config.dataset_dir, config)}
        if needs_answers:
            wanted = {"cfg.conditioning": "teacher_forced", "has_train": "true"}
            inputs["data"] = stage.upstream("extract", config.data, config, wanted)
        for name in names:
            inputs[f"adapter.{name}"] = _adapter(name, config)
        return inputs

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        from xsd import bench, bench_batch, bench_report
        from xsd.commands.extract import dataset_folder
        from xsd.files import make_folder
        from xsd.hidden.store import HiddenStore, find_folder
        from xsd.pairs.catalog import load_pair

        # What cannot be written must not cost the measuring.
        make_folder(config.output_dir / run.work_name)
        pair = load_pair(config)
        scenes = dataset_folder(inputs["dataset_dir"])
        run.dataset("scenes", inputs["dataset_dir"].digest, str(scenes), config.split)
        items = bench.choose_items(scenes, config, pair)
        adapters = {name: inputs[f"adapter.{name}"].path for name in names}
        templates: Mapping[str, Sequence[int]] = {}
        known: Iterable[tuple[str, Sequence[int]]] = ()
        if needs_answers:
            answers = HiddenStore.open(find_folder(inputs["data"].path, "train"))
            templates = bench.templates(answers)
            known = bench.training_answers(answers) if "ngram" in needs_answers else ()
        if config.batch_size > 1:
            records = bench_batch.run(pair, items, strategies, adapters, config, known)
        else:
            records = bench.run(
                pair, config, items, strategies, adapters, templates, config,
                repeats=config.repeats, warmup=config.warmup, answers=known,
            )  # fmt: skip
        total = len(items) * len(strategies) * config.repeats
        found = bench.check_failures(_shown(records, total), len(items), config.max_failures)
        bench_report.write(run, found, items, pair, config, strict_rows(strategies, config))

    return stage.perform(
        "benchmark",
        config,
        resolve=resolve,
        rooms=["kernels", "pairs", "adapters", "decoding", "bench", "bench_batch", "speedup"],
        work=work,
    )


def _batchable(strategies: Sequence[Strategy], batch_size: int) -> list[Strategy]:
    """Leave out, and say so, what cannot draft for a batch.

    Raises:
        XsdError: nothing would be left beside the baseline.
    """
    from xsd.decoding.strategies import batchable

    fit, left_out = batchable(strategies)
    names = ", ".join(strategy.name for strategy in left_out)
    why = "only heads that draft chains without the drafter serve a batch"
    if left_out and len(fit) == 1:
        raise XsdError(f"--batch_size {batch_size} with {names}: {why}")
    if left_out:
        print(f"benchmark: batches leave out {names}: {why}")
    return fit


def _shown(records: Iterator[Trace | Failure], total: int) -> Iterator[Trace | Failure]:
    with progress("benchmark", total, "answers") as bar:
        for record in records:
            yield record
            bar.update()


def _adapter(name: str, config: Config) -> Product:
    """The champion of the level; a fresh one is trained and promoted where there is none."""
    from xsd.tracking import products, registry

    level, _, mode = name.partition(":")
    if config.adapter_dir is not None:
        return products.load(_in_folder(Path(config.adapter_dir), name))
    key = f"{level}-free" if mode == "free" else level
    if registry.champion(config.pair, key) is None:
        conditioning = "free_running" if mode == "free" else "teacher_forced"
        trained = stage.make("train", config, level=level, conditioning=conditioning)
        stage.make("promote", config, candidate=trained.uri)
    return products.load(registry.champion_uri(config.pair, key), {"pair": config.pair})


def _in_folder(root: Path, name: str) -> Path:
    """The checkpoint ``root/<name>``, else the newest training in ``root/<level>``."""
    from xsd.commands.evaluate import conditioning_of

    level, _, mode = name.partition(":")
    own = root / name.replace(":", "_")
    if (own / "best_model.safetensors").is_file():
        return own
    wanted = "free_running" if mode == "free" else "teacher_forced"
    files = sorted((root / level).glob("*/best_model.safetensors"))
    trained = [file.parent for file in files if conditioning_of(file.parent) == wanted]
    return trained[-1] if trained else own


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="benchmark"))
