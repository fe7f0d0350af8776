"""Training of each level on made-up answers: optimizer steps and answers a second, and memory.

    python -m benchmarks.levels --device cuda --width 4096 --vocab_size 32064

Levels that read visual states are left out: made-up answers have none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import synthetic_states
from xsd.adapters.catalog import LEVELS, build, configure
from xsd.adapters.config import AdapterSizes
from xsd.errors import XsdError
from xsd.files import write_json
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.store import HiddenStore
from xsd.learning.batches import TrainBatches
from xsd.learning.config import FitConfig
from xsd.learning.fit import fit


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--levels", help="names between commas; all of them if left out")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=1032, help="the tiny pair's")
    parser.add_argument("--num_samples", type=int, default=1280, help="answers of an epoch")
    parser.add_argument("--num_epochs", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    return parser.parse_args(argv)


def measure(
    level: str, store: HiddenStore, head: VerifierHead, options: argparse.Namespace
) -> dict[str, float]:
    """The fastest epoch's rates, and the most that was held while training."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    adapter = build(configure(level, options.width, options.width, AdapterSizes())).to(device)
    config = FitConfig(
        num_epochs=options.num_epochs + 1,
        early_stopping=0,
        mixed_precision=options.mixed_precision,
    )
    batches = TrainBatches(
        store, adapter.row, batch_size=config.batch_size, seed=0, device=device, head=head
    )
    lm_head = head.lm_head.to(device)
    metric = adapter.row.selection_metric
    seconds, began = [], time.perf_counter()
    for _ in fit(adapter, batches, config, lambda _: {metric: 0.0}, lm_head=lm_head):
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    best = min(seconds[1:])
    num_steps = -(-options.num_samples // config.batch_size)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "parameters": float(sum(p.numel() for p in adapter.parameters())),
        "steps_per_second": num_steps / best,
        "answers_per_second": options.num_samples / best,
        "peak_gib": peak / (1 << 30),
    }


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    wanted = options.levels.split(",") if options.levels else list(LEVELS)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = synthetic_states.make(
            Path(folder),
            options.width,
            vocab_size=options.vocab_size,
            num_train=options.num_samples,
        )
        print(
            f"d = {options.width}, {options.mixed_precision}, batches of {FitConfig().batch_size}"
        )
        for level in wanted:
            if LEVELS[level].visual:
                continue
            try:
                found[level] = measure(level, stores.ours, stores.head, options)
            except (XsdError, torch.OutOfMemoryError) as error:
                print(f"{level:6} {error}")
                continue
            row = found[level]
            print(
                f"{level:6}{row['parameters'] / 1e6:8.1f} M{row['steps_per_second']:8.1f} steps/s"
                f"{row['answers_per_second']:9.0f} answers/s{row['peak_gib']:7.1f} GiB",
                flush=True,
            )
            if options.json:
                write_json(options.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
