"""How long an evaluation takes: stored states streamed, hashed, and scored in one pass.

python -m benchmarks.evaluation                  # L4, 11,000 answers of 36 positions, d = 512
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
from xsd.adapters.catalog import build, configure
from xsd.adapters.config import AdapterSizes
from xsd.counts import Counts
from xsd.files import write_json
from xsd.learning.batches import OrderedBatches
from xsd.metrics import score_batches

LEVEL = "L4"
LENGTH = 36


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=1032, help="the tiny pair's")
    parser.add_argument("--num_samples", type=int, default=11_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--mlflow", action="store_true", help="log to MLflow")
    return parser.parse_args(argv)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    stores = synthetic_states.make(
        folder,
        options.width,
        vocab_size=options.vocab_size,
        num_test=options.num_samples,
        length=LENGTH,
    )
    torch.manual_seed(0)
    adapter = build(configure(LEVEL, options.width, options.width, AdapterSizes()))
    adapter.to(options.device)
    store = stores.ours
    started = time.perf_counter()
    batches = OrderedBatches(
        store, adapter.row, store.keys("test"), batch_size=options.batch_size, head=stores.head
    )
    scored = score_batches(adapter, batches, stores.head.lm_head)
    counts = sum((part.counts for part in scored), Counts())
    seconds = time.perf_counter() - started
    rates = counts.rates()
    return {
        "seconds": seconds,
        "answers_per_second": options.num_samples / seconds,
        "megabytes_per_second": store.num_bytes / seconds / 1e6,
        "token_top1_match": rates["token_top1_match"],
        "cos_sim_mean": rates["cos_sim_mean"],
    }


def log(found: dict[str, Any], options: argparse.Namespace) -> None:
    from xsd.tracking.run import stage_run

    config = {name: str(value) for name, value in vars(options).items()}
    with stage_run("benchmark_evaluation", "synthetic", config) as run:
        run.log({f"measured.{name}": value for name, value in found.items()})


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    print(f"{LEVEL}, {options.num_samples} answers of {LENGTH} positions, d = {options.width}")
    print(
        f"{found['seconds']:.1f} s with hashing: {found['answers_per_second']:.0f} answers/s, "
        f"{found['megabytes_per_second']:.0f} MB/s of stored states"
    )
    if options.json:
        write_json(options.json, found)
    if options.mlflow:
        log(found, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
