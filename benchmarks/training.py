"""Training against a loop of the seed's kind: the same level, weights, loss and optimizer steps.

    python -m benchmarks.training                                  # L4, d = 512 and 1024, a CPU
    python -m benchmarks.training --widths 4096 --vocab_size 32064 --device cuda --num_samples 6400

The loop is as the seed document describes it: float32, batches of 64 as padded as their ``.pt``
chunk is, one chunk read ahead by a thread, PyTorch's modules and AdamW as they come. Its learning
rate falls by the step as ours does, so that metrics compare nothing but the loops. Epochs of all
arms take turns, so that whatever the machine does meanwhile touches all of them alike. Parts of a
step are timed in an epoch of their own, for who times them on a GPU waits for it at their ends.
Answers are made up (``synthetic_states``), of the lengths that the seed reports.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from benchmarks import synthetic_states
from xsd.adapters.base import Adapter
from xsd.adapters.catalog import build, configure
from xsd.adapters.config import AdapterSizes
from xsd.clock import PartTimes
from xsd.files import write_json
from xsd.learning.batches import OrderedBatches, TrainBatches
from xsd.learning.config import FitConfig
from xsd.learning.fit import fit, learning_rate
from xsd.metrics import score

LEVEL = "L4"
SHOWN = ("accepted_prefix_22", "token_top1_match", "cos_sim_mean", "accept_90")
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"mixed_precision": "no"},
    "bf16": {"mixed_precision": "bf16"},
    "fp32-compiled": {"mixed_precision": "no", "compile": True},
    "bf16-compiled": {"mixed_precision": "bf16", "compile": True},
    "bf16-unkept": {"mixed_precision": "bf16", "keep": False},
}


class SeedBlock(nn.Module):
    """L4 of PyTorch's own modules; padded, causal."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        config, block = adapter.config, adapter.blocks[0]
        width = config.d_verifier
        self.attention = nn.MultiheadAttention(
            width, config.num_heads, dropout=config.dropout, batch_first=True
        )
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.ffn_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn_dim, width),
            nn.Dropout(config.dropout),
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm_out, self.project = nn.LayerNorm(width), nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.tensor(0.1))
        self._pairs = [
            (self.attention.in_proj_weight, block.query_key_value.weight),
            (self.attention.in_proj_bias, block.query_key_value.bias),
            *_both(self.attention.out_proj, block.attention_out),
            *_both(self.norm_attention, block.norm_attention),
            *_both(self.norm_ffn, block.norm_ffn),
            *_both(self.ffn[0], block.up),
            *_both(self.ffn[3], block.down),
            *_both(self.norm_out, adapter.norm_out),
            *_both(self.project, adapter.project),
            (self.alpha, adapter.alpha),
        ]
        self._adapter = [adapter]
        with torch.no_grad():
            for mine, theirs in self._pairs:
                mine.copy_(theirs)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        length = h.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        normed = self.norm_attention(h)
        attended, _ = self.attention(
            normed, normed, normed, key_padding_mask=~mask, attn_mask=ahead, need_weights=False
        )
        x = h + self.dropout(attended)
        x = x + self.ffn(self.norm_ffn(x))
        return h + self.alpha * (self.project(self.norm_out(x)) - h)

    @torch.no_grad()
    def as_adapter(self) -> Adapter:
        """The weights as they are now, as what is scored."""
        for mine, theirs in self._pairs:
            theirs.copy_(mine)
        return self._adapter[0]


def _both(mine: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(mine.weight, theirs.weight), (mine.bias, theirs.bias)]  # type: ignore[list-item]


@dataclass
class Arm:
    """One way to train, and what was seen of it."""

    epochs: Iterator[Adapter]
    times: PartTimes
    seconds: list[float] = field(default_factory=list)
    """Of each epoch whose parts nobody timed, validation left out."""
    metrics: dict[str, float] = field(default_factory=dict)


class Bench:
    """One width: its answers, and the arms that learn from them."""

    def __init__(self, folder: Path, width: int, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.stores = synthetic_states.make(
            folder,
            width,
            vocab_size=options.vocab_size,
            num_train=options.num_samples,
            num_val=options.num_val,
            as_seed=True,
        )
        self.lm_head = self.stores.head.lm_head.to(self.device)
        self.config = FitConfig(
            num_epochs=options.num_epochs + 2,
            learning_rate=options.learning_rate,
            early_stopping=0,
            loss=options.loss,
        )

    def adapter(self, seed: int) -> Adapter:
        torch.manual_seed(seed)
        width = self.stores.ours.d_verifier
        sizes = AdapterSizes(dropout=self.options.dropout)
        return build(configure(LEVEL, width, width, sizes)).to(self.device)

    def arms(self, seed: int) -> dict[str, Arm]:
        made: dict[str, Arm] = {}
        times = PartTimes(self.device)
        made["seed's loop"] = Arm(self.seeds_epochs(seed, times), times)
        for name in self.options.arms.split(","):
            times = PartTimes(self.device)
            made[f"xsd {name}"] = Arm(self.our_epochs(seed, ARMS[name], times), times)
        return made

    def our_epochs(self, seed: int, how: dict[str, Any], times: PartTimes) -> Iterator[Adapter]:
        """``fit``, an epoch at a time."""
        adapter = self.adapter(seed)
        batches = TrainBatches(
            self.stores.ours,
            adapter.row,
            batch_size=self.config.batch_size,
            seed=seed,
            device=self.device,
        )
        how = dict(how)
        # Kept as ``train`` keeps it unless said: that is part of the price of a step.
        keep = how.pop("keep", True)
        config = replace(self.config, seed=seed, **how)
        metric = adapter.row.selection_metric
        with tempfile.TemporaryDirectory() as folder:
            reports = fit(
                adapter,
                batches,
                config,
                lambda _: {metric: 0.0},
                lm_head=self.lm_head,
                state=Path(folder) / "state.safetensors" if keep else None,
                times=times,
            )
            yield from (adapter for _ in reports)

    def seeds_epochs(self, seed: int, times: PartTimes) -> Iterator[Adapter]:
        """The loop that the seed document describes."""
        config, model = self.config, SeedBlock(self.adapter(seed))
        model.to(self.device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        random = torch.Generator().manual_seed(seed)
        num_batches = sum(1 for _ in self._seeds_batches(torch.Generator()))
        step = 0
        for _ in range(config.num_epochs):
            batches = self._seeds_batches(random)
            while True:
                with times.part("data"):
                    batch = next(batches, None)
                if batch is None:
                    break
                drafter, verifier, mask = batch
                optimizer.param_groups[0]["lr"] = learning_rate(config, step / num_batches, step)
                step += 1
                with times.part("forward, loss"):
                    out = model(drafter, mask)
                    loss = self._seeds_loss(out, verifier, mask)
                optimizer.zero_grad()
                with times.part("backward"):
                    loss.backward()
                with times.part("optimizer"):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
                    optimizer.step()
                loss.item()
            yield model.as_adapter()

    def _seeds_loss(self, out: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        if self.options.loss == "feature":
            num = mask.sum()
            error = ((out - target).square().mean(dim=-1) * mask).sum() / num
            cosine = (cosine_similarity(out, target, dim=-1) * mask).sum() / num
            return error + 0.5 * (1 - cosine)
        q, p = (log_softmax(x @ self.lm_head.T, dim=-1) for x in (out, target))
        each = kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)
        return (each * mask).sum() / mask.sum()

    def _seeds_batches(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        paths, size = self.stores.seeds, self.config.batch_size
        order = torch.randperm(len(paths), generator=random).tolist()
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(torch.load, paths[order[0]], weights_only=True)
            for number in range(len(order)):
                chunk = ahead.result()
                if number + 1 < len(order):
                    ahead = reader.submit(torch.load, paths[order[number + 1]], weights_only=True)
                lengths = chunk["seq_lens"]
                real = torch.arange(chunk["vl_hidden"].shape[1]) < lengths[:, None]
                for rows in torch.randperm(len(lengths), generator=random).split(size):
                    both = (chunk[name][rows] for name in ("egpt_hidden", "vl_hidden"))
                    drafter, verifier = (x.to(self.device) for x in both)
                    yield drafter, verifier, real[rows].to(self.device)

    def run(self, seed: int) -> dict[str, Arm]:
        arms = self.arms(seed)
        last = self.config.num_epochs - 1
        for epoch in range(self.config.num_epochs):
            for arm in arms.values():
                arm.times.is_on = epoch == last
                started = time.perf_counter()
                adapter = next(arm.epochs)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                # The first one warmed up: files in the cache, products chosen, a GPU's clocks.
                if 0 < epoch < last:
                    arm.seconds.append(time.perf_counter() - started)
                elif epoch == last:
                    arm.metrics = self._validate(adapter)
        return arms

    def _validate(self, adapter: Adapter) -> dict[str, float]:
        store = self.stores.ours
        batches = OrderedBatches(
            store, adapter.row, store.keys("val"), batch_size=self.config.batch_size
        )
        rates = score(adapter, batches, self.lm_head).rates()
        return {name: rates[name] for name in SHOWN}


def summarise(runs: Sequence[dict[str, Arm]], num_samples: int) -> dict[str, Any]:
    """Of each arm: samples a second (fastest and median epoch), shares, metrics by seed."""
    found: dict[str, Any] = {}
    for name in runs[0]:
        arms = [run[name] for run in runs]
        seconds = [x for arm in arms for x in arm.seconds]
        parts = {
            part: sum(arm.times.seconds[part] for arm in arms) for part in arms[0].times.seconds
        }
        found[name] = {
            "samples_per_second": num_samples / min(seconds),
            "samples_per_second_median": num_samples / statistics.median(seconds),
            "share": {part: value / sum(parts.values()) for part, value in parts.items()},
            "val": {key: [arm.metrics[key] for arm in arms] for key in SHOWN},
        }
    first = found["seed's loop"]
    for values in found.values():
        for key in ("samples_per_second", "samples_per_second_median"):
            values[f"ratio_of_{key}"] = values[key] / first[key]
    return found


def show(width: int, found: dict[str, Any]) -> None:
    print(f"\n{LEVEL} at d = {width}")
    parts = list(found["seed's loop"]["share"])
    shares = "".join(f"{part:>15}" for part in parts)
    print(f"{'':14}{'samples/s':>10}{'ratio':>8}{'(medians)':>10}{shares}")
    for name, values in found.items():
        shares = "".join(f"{values['share'][part]:>15.1%}" for part in parts)
        print(
            f"{name:14}{values['samples_per_second']:>10.1f}"
            f"{values['ratio_of_samples_per_second']:>7.2f}x"
            f"{values['ratio_of_samples_per_second_median']:>9.2f}x{shares}"
        )
    print(f"{'validation':14}" + "".join(f"{key:>22}" for key in SHOWN))
    for name, values in found.items():
        cells = (_spread(values["val"][key]) for key in SHOWN)
        print(f"{name:14}" + "".join(f"{cell:>22}" for cell in cells))


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def log(found: dict[str, Any], options: argparse.Namespace) -> None:
    """A run of its own in MLflow: rates and ratios as metrics, everything as a file."""
    from xsd.tracking.run import stage_run

    config = {name: str(value) for name, value in vars(options).items()}
    with (
        stage_run("benchmark_training", "synthetic", config) as run,
        tempfile.TemporaryDirectory() as to,
    ):
        for width, arms in found.items():
            for name, values in arms.items():
                short = name.replace("'", "").replace(" ", "_")
                run.log(
                    {
                        f"measured.{short}.d{width}.{key}": value
                        for key, value in values.items()
                        if isinstance(value, float)
                    }
                )
        write_json(Path(to) / "training.json", found)
        run.artifact(Path(to) / "training.json")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--widths", default="512,1024")
    parser.add_argument("--vocab_size", type=int, default=1032, help="the tiny pair's")
    parser.add_argument("--num_samples", type=int, default=640, help="training answers")
    parser.add_argument("--num_val", type=int, default=200)
    parser.add_argument(
        "--num_epochs", type=int, default=2, help="timed, after one that is not; then one by parts"
    )
    parser.add_argument("--num_seeds", type=int, default=2, help="runs: how far metrics scatter")
    parser.add_argument("--loss", choices=("feature", "token"), default="feature")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--arms", default="fp32,bf16", help=f"ours: {', '.join(ARMS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--mlflow", action="store_true", help="log to MLflow")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    found: dict[str, Any] = {}
    for width in options.widths.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), int(width), options)
            runs = [bench.run(seed) for seed in range(options.num_seeds)]
        found[width] = summarise(runs, options.num_samples)
        show(int(width), found[width])
    if options.json:
        write_json(options.json, found)
    if options.mlflow:
        log(found, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
