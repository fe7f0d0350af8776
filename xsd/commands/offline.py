"""An adapter's offline evaluation: counts, rates, modelled speedup, and the files that say so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import Level
from xsd.commands.adapter_data import test_keys
from xsd.commands.journal import Journal
from xsd.commands.processes import Processes
from xsd.commands.progress import progress
from xsd.counts import MAX_GAMMA, THRESHOLDS, TOP, Counts
from xsd.errors import XsdError
from xsd.files import write_json, write_text
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.store import HiddenStore
from xsd.learning.batches import OrderedBatches
from xsd.metrics import Scored, score_batches
from xsd.speedup import Costs, modelled
from xsd.speedup_config import CostsConfig

if TYPE_CHECKING:
    from xsd.tracking.run import Run


def costs(config: CostsConfig) -> Costs:
    """The assumed costs of a modelled speedup."""
    return Costs(
        step_ms=config.verifier_step_ms,
        drafter_step_ms=config.drafter_step_ms,
        adapter_ms=config.adapter_ms,
        verifier_prefill_ms=config.verifier_prefill_ms,
        drafter_prefill_ms=config.drafter_prefill_ms,
        pass_ms=config.passes(),
        verifier_slowdown=config.verifier_slowdown,
        drafter_slowdown=config.drafter_slowdown,
    )


def answer_lengths(store: HiddenStore, keys: Iterable[str]) -> Int[np.ndarray, " S"]:
    """Tokens of each answer, EOS included."""
    return np.array([len(store.sample(key).verifier_ids) for key in keys])


@dataclass(frozen=True)
class Evaluation:
    """What was found out about one adapter."""

    row: Level
    num_parameters: int
    counts: Counts
    modelled: Mapping[str, float]
    costs: Costs
    mean_tokens: float

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        store: HiddenStore,
        head: VerifierHead,
        config: CostsConfig,
        batch_size: int,
        processes: Processes | None = None,
        journal: Journal | None = None,
    ) -> Evaluation:
        """Score the test answers of a store, in one pass; every process a share of the batches.

        Args:
            journal: where counts are kept batch by batch; what is in it is not counted again.
        """
        row, together, keys = adapter.row, processes or Processes(), test_keys(store)
        # Others may have begun to write when the last one reads: one looks for all.
        done = together.tell(journal.read() if journal and together.is_main else {})
        batches = OrderedBatches(
            store,
            row,
            keys,
            batch_size=batch_size,
            head=head,
            share=(together.rank, together.count),
            done=done,
        )
        shown = _shown(batches, row.name, len(done)) if together.is_main else batches
        parts = score_batches(adapter, shown, head.lm_head, max_gamma=depth(config))
        mine: dict[int, Scored] = {}
        with journal.writing(together.rank) if journal else nullcontext() as keep:
            for number, part in zip(batches.numbers, parts, strict=True):
                mine[number] = part
                if keep is not None:
                    keep(number, part)
        for share in together.gather(mine):
            done |= share
        scored = [done[number] for number in sorted(done)]
        counts = sum((part.counts for part in scored), Counts())
        if not math.isfinite(counts.target.cos_sum):
            raise XsdError(
                f"{store.path}: holds states that are not finite; 'xsd store verify' names them"
            )
        lengths, assumed = answer_lengths(store, keys), costs(config)
        if row.phase == "gap":
            speedups = modelled(
                assumed,
                lengths,
                accepted_prefix=np.array([n for part in scored for n in part.accepted]),
                coupled=store.header.conditioning == "teacher_forced",
            )
        else:
            speedups = modelled(
                assumed,
                lengths,
                tau=counts.rates()[f"tau_{config.gamma}"],
                gamma=config.gamma,
                with_drafter="drafter" in row.streams,
            )
        num_parameters = sum(x.numel() for x in adapter.parameters())
        return cls(row, num_parameters, counts, speedups, assumed, float(lengths.mean()))

    @property
    def metrics(self) -> dict[str, float]:
        """Flat keys: equal for all levels, so that runs compare."""
        rates = self.counts.rates()
        return {
            **rates,
            **self.modelled,
            "accept_length": rates[self.row.selection_metric],
            "num_parameters": self.num_parameters,
            "num_samples": self.counts.target.num_samples,
        }

    @property
    def line(self) -> str:
        rates = self.metrics
        return (
            f"evaluate {self.row.name}: cos_sim {rates['cos_sim_mean']:.3f}, "
            f"accept@0.90 {rates['accept_90']:.1%}, token match {rates['token_top1_match']:.1%}, "
            f"{self.row.selection_metric} {rates['accept_length']:.2f}"
        )

    def write(self, folder: Path, run: Run) -> None:
        """All files under their published names, into ``folder`` and the run."""
        from xsd.plots.offline import metrics_summary, token_metrics
        from xsd.plots.timeline import stage_timeline

        name = self.row.name
        about = {"level": name, "costs": asdict(self.costs), "counts": asdict(self.counts)}
        write_json(folder / "acceptance_metrics.json", {**self.metrics, **about})
        same = self.counts.same_position
        positions = {
            "target": self.counts.target.positions(),
            "same_position": same.positions() if same.num_samples else [],
        }
        write_json(folder / "position_stats.json", positions)
        write_text(folder / "METRICS_COMPARISON.md", self.comparison())
        for file in ("acceptance_metrics.json", "position_stats.json", "METRICS_COMPARISON.md"):
            run.artifact(folder / file)
        accepted = self.modelled.get("modelled.gap_accepted")
        timeline = stage_timeline(
            self.costs,
            round(self.mean_tokens),
            None if accepted is None else round(accepted),
            self.modelled.get("modelled.decode_speedup", 1.0),
        )
        figures = {
            "metrics_summary": metrics_summary(name, self.counts, self.modelled),
            "token_metrics": token_metrics(name, self.counts),
            "stage_timeline": timeline,
        }
        run.figures(figures, folder)

    def comparison(self) -> str:
        """Markdown: what states say beside what tokens say."""
        rates = self.metrics
        lines = [
            f"# {self.row.name}: hidden states against tokens",
            "",
            f"{self.row.description}; {rates['num_samples']} answers, output at t held against "
            f"position t + {self.row.shift}.",
            "",
            "| hidden states | accepted | in a row |",
            "|---|---|---|",
        ]
        for percent in (round(100 * threshold) for threshold in THRESHOLDS):
            share, in_a_row = rates[f"accept_{percent}"], rates[f"consecutive_mean_{percent}"]
            lines.append(f"| cosine > 0.{percent} | {share:.1%} | {in_a_row:.2f} |")
        lines += ["", "| tokens | |", "|---|---|"]
        lines += [f"| among the top {k} | {rates[f'token_top{k}_match']:.1%} |" for k in TOP]
        lines.append(
            f"| accept length ({self.row.selection_metric}) | {rates['accept_length']:.2f} |"
        )
        lines += ["", "| modelled, from assumed costs | |", "|---|---|"]
        lines += [
            f"| {key.removeprefix('modelled.')} | {value:.3f} |"
            for key, value in self.modelled.items()
        ]
        lines += [
            "",
            "A state near the verifier's need not give its token, and one that gives it need not "
            "be near. Drafts are accepted by token, so accept length is what selects.",
        ]
        return "\n".join(lines) + "\n"


def depth(config: CostsConfig) -> int:
    """Drafts a cycle that are counted up to."""
    return max(MAX_GAMMA, config.gamma)


def _shown(batches: OrderedBatches, level: str, num_done: int) -> Iterator[Streams]:
    if num_done:
        print(f"evaluate {level}: goes on behind {num_done} batches that were scored before")
    with progress(f"evaluate {level}", len(batches), "batches") as bar:
        for streams in batches:
            yield streams
            bar.update()
