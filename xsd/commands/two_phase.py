"""``two_phase``: a gap adapter and a head together, offline, and the speedup they model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.commands.adapter_data import find_inputs, open_head, open_store, test_keys
from xsd.config import Level
from xsd.errors import XsdError
from xsd.pairs.config import PairConfig
from xsd.speedup_config import CostsConfig

if TYPE_CHECKING:
    from xsd.adapters.base import Adapter
    from xsd.speedup import Costs
    from xsd.tracking.products import Product
    from xsd.tracking.run import Run
    from xsd.two_phase import TwoPhaseCounts

HELP = "score a prefill adapter and a decode adapter together"
ROOMS = ("adapters", "hidden", "counts", "metrics", "decoding/accept", "speedup", "two_phase")


@dataclass(frozen=True)
class Config(CostsConfig, PairConfig, stage.StageConfig):
    """Options of the two_phase stage."""

    prefill_checkpoint: str | None = None
    """Adapter of the prefill gap: file, folder or URI; null: the newest training of its level."""
    decode_checkpoint: str | None = None
    """Adapter of decode; null: the newest training of its level."""
    prefill_level: Level = Level("X1")
    """Level to look for where no prefill checkpoint is given."""
    decode_level: Level = Level("E3")
    """Level to look for where no decode checkpoint is given."""
    data: str | None = None
    """Extraction; null: the newest of the pair."""
    lm_head: str | None = None
    """The verifier's LM head; null: the newest of the pair."""
    batch_size: int = 64
    """Answers scored together."""
    output_dir: Path | None = None
    """Where results go; null: a folder in outputs/two_phase."""


def perform(config: Config) -> Product:
    """Phase 1 drafts the opening, phase 2 goes on where it stopped."""

    def resolve() -> dict[str, Product]:

        found: dict[str, Product] = {}
        for role, level in (("prefill", config.prefill_level), ("decode", config.decode_level)):
            given = getattr(config, f"{role}_checkpoint")
            found[f"{role}_checkpoint"] = stage.upstream(
                "train", given, config, {"level": level}, level=level
            )
        return {**found, **find_inputs(config, "test", "teacher_forced")}

    return stage.perform(
        "two_phase",
        config,
        resolve=resolve,
        rooms=ROOMS,
        work=lambda run, inputs: _work(run, inputs, config),
    )


def _work(run: Run, inputs: Mapping[str, Product], config: Config) -> None:
    from xsd.commands.offline import costs
    from xsd.files import make_folder
    from xsd.learning.batches import OrderedBatches
    from xsd.pairs.device import choose_device
    from xsd.two_phase import count_two_phase

    # What cannot be written must not cost the counting.
    folder = make_folder(config.output_dir or Path("outputs/two_phase") / run.work_name)
    store = open_store(inputs["data"].path, "test")
    run.dataset(store.path.name, store.digest, str(store.path), "test")
    head = open_head(inputs["lm_head"].path, store)
    widths, device = (store.d_drafter, store.d_verifier), choose_device(config.device)
    gap, decode = (
        _load(inputs[f"{role}_checkpoint"].path, phase, widths).to(device)
        for role, phase in (("prefill", "gap"), ("decode", "decode"))
    )
    keys = test_keys(store)
    both = [
        OrderedBatches(store, adapter.row, keys, batch_size=config.batch_size, head=head)
        for adapter in (gap, decode)
    ]
    assumed = costs(config)
    counts = count_two_phase(
        gap,
        decode,
        zip(*both, strict=True),
        head.lm_head.to(device),
        num_free=assumed.num_free,
        gamma=config.gamma,
    )
    with_drafter = "drafter" in decode.row.streams
    metrics = results(counts, assumed, config.gamma, with_drafter=with_drafter)
    name = f"{gap.row.name}+{decode.row.name}"
    _write(run, name, metrics, assumed, folder)
    run.log(metrics)
    run.tag({"level": name, "mlflow.runName": f"two_phase {name}"})
    run.say(
        f"two_phase {name}: {metrics['phase1.accepted']:.2f} drafts accepted in the gap, then "
        f"tau_{config.gamma} {metrics[f'phase2.tau_{config.gamma}']:.2f}; modelled speedup "
        f"{metrics['modelled.speedup_e2e']:.2f}x"
    )


def results(
    counts: TwoPhaseCounts, assumed: Costs, gamma: int, *, with_drafter: bool
) -> dict[str, float]:
    """Flat metrics: both phases, and the modelled speedup of both and of either alone."""
    import numpy as np

    from xsd.speedup import modelled

    lengths, accepted = np.array(counts.lengths), np.array(counts.accepted)
    both = modelled(
        assumed,
        lengths,
        accepted_prefix=accepted,
        tau=counts.tau,
        gamma=gamma,
        with_drafter=with_drafter,
    )
    alone = {
        "gap": modelled(assumed, lengths, accepted_prefix=accepted),
        "decode": modelled(
            assumed, lengths, tau=counts.tau_alone, gamma=gamma, with_drafter=with_drafter
        ),
    }
    return {
        "phase1.accepted": float(accepted.mean()),
        f"phase2.tau_{gamma}": counts.tau,
        f"phase2.tau_{gamma}_from_the_start": counts.tau_alone,
        "num_samples": len(lengths),
        "mean_tokens": float(lengths.mean()),
        **both,
        **{f"modelled.{k}_only_speedup": v["modelled.speedup_e2e"] for k, v in alone.items()},
    }


def _load(path: Path, phase: str, widths: tuple[int, int]) -> Adapter:
    from xsd.adapters import checkpoint

    adapter, _ = checkpoint.load(path, expect_widths=widths)
    if adapter.row.phase != phase:
        raise XsdError(f"{path}: level {adapter.row.name} does not draft in the {phase} phase")
    return adapter


def _write(run: Run, name: str, metrics: Mapping[str, float], assumed: Costs, folder: Path) -> None:
    from xsd.files import write_json
    from xsd.plots.timeline import stage_timeline

    write_json(folder / "two_phase.json", {"levels": name, **metrics, "costs": asdict(assumed)})
    run.artifact(folder / "two_phase.json")
    figure = stage_timeline(
        assumed,
        round(metrics["mean_tokens"]),
        round(metrics["phase1.accepted"]),
        metrics["modelled.decode_speedup"],
    )
    run.figures({"stage_timeline": figure}, folder)


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="two_phase"))
