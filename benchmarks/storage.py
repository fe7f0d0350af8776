"""What stored states cost in bytes, and what rounding them does to an adapter's metrics.

    python benchmarks/storage.py                                # newest L4, E1, E3, or new ones
    python benchmarks/storage.py --adapters outputs/train/E3/x  # given ones: folders or URIs
    python benchmarks/storage.py --log true                     # the same, kept in MLflow

Test clips are answered once, in fp32; that store is converted to bf16 and to fp8, and every adapter
is scored on the three. Answers, keys and targets are the same; only the states are rounded.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xsd.adapters import checkpoint
from xsd.adapters.base import Adapter
from xsd.errors import XsdError
from xsd.files import write_json
from xsd.hidden.check import stats
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import clips_together, extract, header
from xsd.hidden.lm_head import VerifierHead
from xsd.hidden.place import Place
from xsd.hidden.plan import plan_batches
from xsd.hidden.rewrite import convert
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.learning.batches import OrderedBatches
from xsd.metrics import score
from xsd.pairs.base import ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes
from xsd.scenes.dsec import load_index

DTYPES = ("fp32", "bf16", "fp8")
METRICS = ("cos_sim_mean", "accept_90", "token_top1_match", "token_top5_match")
BAR = 1e-3
"""A metric that keeps its first three digits moves by a smaller share."""


def make_stores(pair: ModelPair, dataset: Path, folder: Path) -> dict[str, HiddenStore]:
    """The same answers in every precision."""
    config = ExtractConfig(dtype="fp32")
    batches = plan_batches(load_index(dataset), "test", config, clips_together(pair, config))
    top = header(pair, batches, "test", config, "benchmark")
    with HiddenWriter.open(folder / "fp32", top, batches) as writer:
        for number, extracted in enumerate(extract(pair, batches, config)):
            writer.add(number, extracted)
    for dtype in DTYPES[1:]:
        for _ in convert(Place(str(folder / "fp32")), Place(str(folder / dtype)), dtype):
            pass
    return {dtype: HiddenStore.open(folder / dtype) for dtype in DTYPES}


def sizes(store: HiddenStore) -> dict[str, float]:
    """Bytes, and how quick answers come."""
    found = stats(Place(str(store.path)))
    keys = list(store.keys())
    for key in keys:
        store.sample(key)  # what is hashed when it is first read has been read
    random.Random(0).shuffle(keys)
    start = time.perf_counter()
    for key in keys:
        store.sample(key).verifier_hidden.sum()
    seconds = time.perf_counter() - start
    return {
        "pair_bytes": found.pair_bytes,
        "index_bytes": found.index_bytes,
        "visual_bytes": found.visual_bytes,
        "over_fp32": found.pair_bytes / found.fp32_bytes,
        "over_fp32_with_index": (found.pair_bytes + found.index_bytes) / found.fp32_bytes,
        "us_per_random_answer": 1e6 * seconds / len(keys),
    }


def rates(adapter: Adapter, store: HiddenStore, head: VerifierHead) -> dict[str, float]:
    batches = OrderedBatches(store, adapter.row, store.keys("test"), batch_size=64, head=head)
    found = score(adapter, batches, head.lm_head).rates()
    return {name: found[name] for name in (*METRICS, adapter.row.selection_metric)}


def adapters(options: argparse.Namespace) -> list[Path]:
    """Given ones, or the newest of some levels, made if there are none."""
    from xsd.tracking import products

    if options.adapters:
        return [products.load(uri).path for uri in options.adapters.split(",")]
    from xsd.commands import stage
    from xsd.commands.evaluate import Config

    config = Config(pair=options.pair, device=options.device)
    return [
        stage.upstream("train", None, config, {"level": level}, level=level).path
        for level in ("L4", "E1", "E3")
    ]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chosen = [checkpoint.load(path)[0] for path in adapters(options)]
    pair = load_pair(PairConfig(pair=options.pair, device=options.device))
    dataset = options.dataset_dir
    if dataset is None:
        dataset = folder / "scenes"
        wanted = ScenesConfig(
            output_dir=dataset, num_train=0, num_val=0, num_test=options.num_clips, seed=1
        )
        for _ in make_scenes(wanted):
            pass
    stores = make_stores(pair, dataset, folder)
    verifier = pair.verifier
    head = VerifierHead(
        verifier.lm_head.weight.detach().float().cpu(), verifier.embedding.float().cpu(), "", ""
    )
    return {
        "pair": pair.name,
        "num_answers": len(stores["fp32"]),
        "stores": {dtype: sizes(store) for dtype, store in stores.items()},
        "levels": {
            adapter.row.name: {
                dtype: rates(adapter, store, head) for dtype, store in stores.items()
            }
            for adapter in chosen
        },
    }


def changes(levels: Mapping[str, Mapping[str, Mapping[str, float]]], dtype: str) -> dict[str, Any]:
    """Largest change of a metric against fp32, absolute and as a share of it."""
    found = [
        (abs(by_dtype[dtype][name] - exact), exact, level, name)
        for level, by_dtype in levels.items()
        for name, exact in by_dtype["fp32"].items()
    ]
    absolute = max(found)
    relative = max((change / exact, level, name) for change, exact, level, name in found if exact)
    return {
        "absolute": absolute[0],
        "absolute_of": f"{absolute[2]} {absolute[3]}",
        "relative": relative[0],
        "relative_of": f"{relative[1]} {relative[2]}",
    }


def show(found: Mapping[str, Any]) -> None:
    print(f"\n{found['num_answers']} answers of {found['pair']}")
    print(f"{'':<6}  pairs MiB  of fp32  and index  visual MiB  us/answer")
    for dtype, size in found["stores"].items():
        print(
            f"{dtype:<6}{size['pair_bytes'] / 2**20:>11.2f}{size['over_fp32']:>9.4f}"
            f"{size['over_fp32_with_index']:>11.4f}{size['visual_bytes'] / 2**20:>12.2f}"
            f"{size['us_per_random_answer']:>11.1f}"
        )
    for level, by_dtype in found["levels"].items():
        names = list(by_dtype["fp32"])
        print(f"\n{level:<6}" + "".join(f"{name:>22}" for name in names))
        for dtype, metrics in by_dtype.items():
            print(f"{dtype:<6}" + "".join(f"{metrics[name]:>22.6f}" for name in names))
    for dtype, change in found["changes"].items():
        print(
            f"\n{dtype}: at most {change['absolute']:.6f} ({change['absolute_of']}), "
            f"{change['relative']:.3%} of a metric ({change['relative_of']})"
        )
    size, change = found["stores"]["bf16"]["over_fp32"], found["changes"]["bf16"]["relative"]
    print(
        f"bars for bf16: at most 0.52 of fp32: {'reached' if size <= 0.52 else 'NOT reached'}; "
        f"no metric moves by {BAR:.1%}: {'reached' if change < BAR else 'NOT reached'}"
    )


def log(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Keep the numbers in MLflow."""
    from xsd.tracking.run import stage_run

    values = {name: str(value) for name, value in vars(options).items()}
    with stage_run("benchmark_storage", options.pair, values) as run:
        for dtype, change in found["changes"].items():
            run.log({f"{dtype}.largest_change": change["relative"]})
        for dtype, size in found["stores"].items():
            run.log({f"{dtype}.over_fp32": size["over_fp32"]})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "storage.json"
            write_json(path, found)
            run.artifact(path)
        print(f"kept: {run.link()}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pair", default=asdict(PairConfig())["pair"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--adapters", help="folders, runs:/ or models:/ URIs, with commas between")
    parser.add_argument("--dataset_dir", type=Path, help="scenes; else synthetic ones are made")
    parser.add_argument("--num_clips", type=int, default=60)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--log", default="false", choices=["true", "false"], help="to MLflow")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    found["changes"] = {dtype: changes(found["levels"], dtype) for dtype in DTYPES[1:]}
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.log == "true":
        log(options, found)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except XsdError as error:
        print(f"storage.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
