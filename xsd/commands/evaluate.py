"""``evaluate``: offline metrics of one adapter on held-out answers, and the speedup they model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.cli import main
from xsd.commands import stage
from xsd.commands.adapter_data import find_inputs, open_head, open_store
from xsd.commands.processes import Processes, lead_or_serve
from xsd.config import Level, variant
from xsd.pairs.config import PairConfig
from xsd.speedup_config import CostsConfig

if TYPE_CHECKING:
    from xsd.commands.journal import Journal
    from xsd.commands.offline import Evaluation
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

ROOMS = ["adapters", "hidden", "counts", "metrics", "decoding/accept"]
"""The source that decides what is counted."""
HELP = "score one adapter on held-out answers"


@dataclass(frozen=True)
class Config(CostsConfig, PairConfig, stage.StageConfig):
    """Options of the evaluate stage."""

    checkpoint: str | None = None
    """Adapter: file, folder or URI; null: the newest training of the pair (and level)."""
    level: Level | None = None
    """Level that the checkpoint must hold; null: whichever it holds."""
    data: str | None = None
    """Extraction; null: the newest of the pair and the adapter's conditioning."""
    lm_head: str | None = None
    """The verifier's LM head; null: the newest of the pair."""
    batch_size: int = 64
    """Answers scored together."""
    output_dir: Path | None = None
    """Where results go; null: beside a checkpoint given by path, else outputs/evaluate."""


def perform(config: Config, processes: Processes | None = None) -> Product:
    """Count, divide, model, write.

    Args:
        processes: of the launch, of which this is the main one; None: nobody helps.
    """
    together = processes or Processes()

    def resolve() -> dict[str, Product]:
        level = {} if config.level is None else {"level": config.level}
        adapter = stage.upstream("train", config.checkpoint, config, level, **level)
        return {"checkpoint": adapter, **find_inputs(config, "test", conditioning_of(adapter.path))}

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        store = open_store(inputs["data"].path, "test")
        run.dataset(store.path.name, store.digest, str(store.path), "test")
        given, root = _given_folder(config), Path("outputs/evaluate")
        task = Task(dict(inputs), (given or root).resolve(), run.run_id)
        found, extra, journal = _evaluate(together.tell(task), config, together)
        found.write(given or root / run.work_name, run)
        run.log(found.metrics, model_id=inputs["checkpoint"].model_id)
        kept = ("loss", "conditioning", "selected_on_test", "approximate_split")
        tags = {"level": found.row.name, **{name: extra.get(name) for name in kept}}
        run.tag({**tags, "mlflow.runName": f"evaluate {variant(tags)}"})
        run.tag({"mlflow.note.content": found.comparison()})
        print(found.line)
        finished.append(journal)

    finished: list[Journal] = []
    product = stage.perform(
        "evaluate",
        config,
        resolve=resolve,
        rooms=[*ROOMS, "speedup"],
        work=work,
        tags={"level": config.level},
    )
    # Only now: an evaluation whose run did not end well is taken up again.
    for journal in finished:
        journal.remove()
    return product


@dataclass(frozen=True)
class Task:
    """What the main process tells the others to score."""

    inputs: Mapping[str, Product]
    folder: Path
    """Where counts are kept until all are there."""
    run_id: str
    """Whose evaluation it is."""


def _evaluate(
    task: Task, config: Config, processes: Processes
) -> tuple[Evaluation, Mapping[str, Any], Journal]:
    """What was found, what the checkpoint says of itself, and where the counts are kept."""
    from xsd.adapters import checkpoint
    from xsd.commands.journal import Journal
    from xsd.commands.offline import Evaluation, depth
    from xsd.pairs.device import choose_device
    from xsd.tracking.reuse import any_finished, stage_key

    inputs = task.inputs
    store = open_store(inputs["data"].path, "test")
    adapter, about = checkpoint.load(
        inputs["checkpoint"].path,
        expect_level=config.level,
        expect_widths=(store.d_drafter, store.d_verifier),
    )
    head = open_head(inputs["lm_head"].path, store)
    device = choose_device(config.device)
    # Not the run's key: costs change no count, and results may come to lie beside the checkpoint.
    counted = {
        "adapter": [inputs["checkpoint"].path.name, about["sha256"]],
        "data": store.digest,
        "lm_head": inputs["lm_head"].digest,
        "batch_size": config.batch_size,
        "depth": depth(config),
        "device": device.type,
    }
    key = stage_key("counts", counted, {}, [*ROOMS, "kernels", "learning"])
    journal = Journal(task.folder / f".counts_{key[:16]}")
    if processes.is_main:
        journal.begin(task.run_id, any_finished)
    found = Evaluation.of(
        adapter.to(device), store, head, config, config.batch_size, processes, journal
    )
    return found, about["extra"], journal


def conditioning_of(path: Path) -> str:
    """What the adapter was trained on, and so is scored on."""
    from xsd.adapters.checkpoint import CONFIG
    from xsd.files import read_json

    about = (path if path.is_dir() else path.parent) / CONFIG
    found = read_json(about) if about.is_file() else {}
    # A file that says nothing of the kind is refused where the adapter is loaded.
    extra = found.get("extra", {}) if isinstance(found, dict) else {}
    return str(extra.get("conditioning", "teacher_forced"))


def _given_folder(config: Config) -> Path | None:
    """Where results were asked for, or beside a checkpoint given by path."""
    if config.output_dir is not None:
        return config.output_dir
    given = Path(config.checkpoint or "")
    if config.checkpoint is not None and given.exists():
        return given if given.is_dir() else given.parent
    return None


def run(config: Config) -> None:
    lead_or_serve(
        config.device,
        lambda processes: perform(config, processes),
        lambda task, processes: _evaluate(task, config, processes),
    )


if __name__ == "__main__":
    raise SystemExit(main(command="evaluate"))
