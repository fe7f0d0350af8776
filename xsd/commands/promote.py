"""``promote``: the gate between a trained adapter and the alias that the benchmark loads."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.bench_config import BenchConfig
from xsd.cli import main
from xsd.commands import stage
from xsd.commands.adapter_data import TrainingData
from xsd.config import Level, variant
from xsd.errors import XsdError
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.adapters.base import Adapter
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

HELP = "register an adapter as its level's champion, if it passes the gate"


@dataclass(frozen=True)
class Config(PairConfig, stage.StageConfig):
    """Options of the promote stage."""

    candidate: str | None = None
    """A training or sweep, or a logged model, as URI; null: the newest training (of the level)."""
    level: Level | None = None
    """Level that the candidate must be of; null: whichever it is."""
    dataset_dir: str | None = None
    """Scenes of the short decode; null: the newest of the pair."""
    num_answers: int = 6
    """Answers that are decoded to see that nothing changes; their scenes are validation scenes."""

    def __post_init__(self) -> None:
        if self.num_answers < 1:
            raise XsdError(f"num_answers={self.num_answers}: must be at least 1")


def perform(config: Config) -> Product:
    """Judge the candidate; move the alias, or record why not."""

    def resolve() -> dict[str, Product]:
        filters = {} if config.level is None else {"level": config.level}
        candidate = stage.upstream("train", config.candidate, config, filters, **filters)
        # What cannot be promoted must not cost the making of scenes.
        validation = _validation_inputs(candidate)
        scenes = stage.upstream("scenes", config.dataset_dir, config)
        return {"candidate": candidate, "dataset_dir": scenes, **validation}

    return stage.perform(
        "promote",
        config,
        resolve=resolve,
        rooms=["kernels", "adapters", "decoding", "counts", "metrics", "bench"],
        work=lambda run, inputs: _judge(run, inputs, config),
        tags={"level": config.level},
    )


def _validation_inputs(candidate: Product) -> dict[str, Product]:
    """What the candidate was selected on: read off the run that made it."""
    from xsd.tracking import products

    if candidate.run_id is None or candidate.model_id is None:
        raise XsdError(
            f"{candidate.uri}: only an adapter of a tracked run can be promoted; give a runs:/ URI"
        )
    tags = _run_tags(candidate)
    roles = ("data", "lm_head", "val_data")
    return {role: products.load(tags[f"input.{role}"]) for role in roles if f"input.{role}" in tags}


def _judge(run: Run, inputs: Mapping[str, Product], config: Config) -> None:
    from xsd.files import write_json
    from xsd.tracking import registry

    candidate = inputs["candidate"]
    assert candidate.model_id is not None, "checked when the inputs were found"
    tags = _run_tags(candidate)
    if config.level is not None and tags["level"] != config.level:
        raise XsdError(f"{candidate.uri}: of level {tags['level']}, not {config.level}")
    gate = _Gate(inputs, tags, config)
    # The gate adds the accept lengths that it measured to what the version will say of itself.
    outcome = registry.promote(
        config.pair, _registered(tags), candidate.model_id, gate, gate.version_tags
    )
    incumbent = f"version {outcome.version}" if outcome.version else "none"
    verdict = "promoted" if outcome.promoted else "refused" if outcome.reasons else "stands already"
    run.log(gate.scores)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gate.json"
        write_json(path, {**asdict(outcome), "accept_length": gate.scores})
        run.artifact(path)
    run.tag(
        {
            **{name: tags.get(name) for name in ("level", "loss", "conditioning")},
            "promoted": str(outcome.promoted).lower(),
            "reasons": "; ".join(outcome.reasons) or None,
            "champion": outcome.uri,
            "mlflow.runName": f"promote {variant(tags)}",
        }
    )
    why = f" ({'; '.join(outcome.reasons)})" if outcome.reasons else ""
    run.say(f"promote {tags['level']}: {verdict}{why}; {outcome.uri} is {incumbent}")


class _Gate:
    """Incumbent -> reasons against the candidate; cheap questions first."""

    def __init__(self, inputs: Mapping[str, Product], tags: Mapping[str, str], config: Config):
        self.inputs, self.tags, self.config = inputs, tags, config
        self.scores: dict[str, float] = {}
        """Accept lengths, as ``candidate`` and ``incumbent``."""
        self.version_tags: dict[str, object] = {
            "val_digest": tags["val_digest"],
            "dataset_digest": tags["data_digest"],
            "metric": tags["selection_metric"],
        }

    def __call__(self, incumbent: Any) -> list[str]:
        from xsd.adapters import checkpoint
        from xsd.tracking import products

        if self.tags.get("selected_on_test") == "true":
            return ["its weights were chosen on test data"]
        try:
            # Finite weights and matching hashes are what loading demands.
            model = products.load(f"models:/{self.inputs['candidate'].model_id}")
            adapter, about = checkpoint.load(model.path, expect_level=self.tags["level"])
        except XsdError as error:
            return [str(error)]
        widths = {name: getattr(adapter.config, name) for name in ("d_drafter", "d_verifier")}
        self.version_tags |= {**widths, "sha256": about["sha256"]["best_model"]}
        if not adapter.deployable:
            return ["its attention sees the future, so it cannot draft live"]
        return self._worse(adapter, incumbent) or self._lossy(adapter, model.path)

    def _worse(self, adapter: Adapter, incumbent: Any) -> list[str]:
        """Both are scored here and now, on the candidate's validation answers."""
        from xsd.adapters import checkpoint
        from xsd.tracking import products, registry

        mine = self.scores["candidate"] = self._accept_length(adapter)
        self.version_tags["accept_length"] = f"{mine:.4f}"
        metric = adapter.row.selection_metric
        if not math.isfinite(mine):
            return [f"its {metric} is {mine}"]
        if incumbent is None:
            return []
        try:
            champion = products.load(
                registry.champion_uri(self.config.pair, _registered(self.tags))
            )
            rival, _ = checkpoint.load(champion.path)
        except XsdError as error:
            # A champion that cannot be loaded serves nobody, so it does not stand in the way.
            print(f"promote: the incumbent is out: {error}")
            return []
        if rival.config.d_verifier != adapter.config.d_verifier:
            return ["the incumbent serves a pair of other widths; promote it under its own name"]
        theirs = self.scores["incumbent"] = self._accept_length(rival)
        if mine > theirs:
            return []
        return [f"{metric} {mine:.3f} does not beat version {incumbent.version}'s {theirs:.3f}"]

    def _accept_length(self, adapter: Adapter) -> float:
        from xsd.commands.adapter_data import SELECTION_GAMMA
        from xsd.learning.batches import OrderedBatches
        from xsd.metrics import score
        from xsd.pairs.device import choose_device

        data = TrainingData.open(self.inputs)
        batches = OrderedBatches(
            data.val_store, adapter.row, data.val_keys, batch_size=64, head=data.head
        )
        adapter = adapter.to(choose_device(self.config.device))
        counts = score(adapter, batches, data.head.lm_head, max_gamma=SELECTION_GAMMA)
        return counts.rates()[adapter.row.selection_metric]

    def _lossy(self, adapter: Adapter, folder: Path) -> list[str]:
        from xsd import bench
        from xsd.commands.extract import dataset_folder
        from xsd.decoding.strategies import config_of, parse
        from xsd.pairs.catalog import load_pair

        level, num_answers = self.tags["level"], self.config.num_answers
        mode = ":free" if self.tags.get("conditioning") == "free_running" else ""
        name = config_of(f"{level}{mode}")
        pair = load_pair(self.config)
        chosen = BenchConfig(max_samples=num_answers, split="val")
        items = bench.choose_items(dataset_folder(self.inputs["dataset_dir"]), chosen, pair)
        strategy = parse(name, chosen.gamma)
        if bench.is_lossless(pair, self.config, items, strategy, folder):
            return []
        return [f"{name} changed, or could not give, one of {num_answers} answers"]


def _registered(tags: Mapping[str, str]) -> str:
    """Adapters of free-running pairs have a name of their own: they serve another mode."""
    free = tags.get("conditioning") == "free_running"
    return f"{tags['level']}-free" if free else tags["level"]


def _run_tags(candidate: Product) -> Mapping[str, str]:
    """Tags of the run that made it; a logged model has but some of them."""
    from xsd.tracking import products

    return products.load(f"runs:/{candidate.run_id}").tags


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="promote"))
