"""What stored states cost in bytes, and what rounding them does to an adapter's metrics.

    python -m benchmarks.storage                                # newest L4, E1, E3, or new ones
    python -m benchmarks.storage --adapters outputs/train/E3/x  # given ones: folders or URIs
    python -m benchmarks.storage --mlflow                       # the same, kept in MLflow

Test clips are answered once, in fp32; that store is converted to bf16 and to fp8, and every adapter
is scored on the three. Answers, keys and targets are the same; only the states are rounded.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
NEW_EPOCHS = 6
"""Of adapters that must be trained first: half-trained ones round no otherwise."""
SIZE_BAR = 0.52
"""Of fp32: what the pairs may take in bf16."""


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
    # Of its kind that is meant for such states: not L4 for free-running ones, not of another loss.
    kind = {"conditioning": "teacher_forced", "loss": "token"}
    return [
        stage.upstream(
            "train", None, config, {"level": level, **kind}, level=level, num_epochs=NEW_EPOCHS
        ).path
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


@dataclass(frozen=True, slots=True)
class Change:
    """What rounding the states did to one metric of one level."""

    level: str
    metric: str
    exact: float
    """In fp32."""
    rounded: float

    @property
    def absolute(self) -> float:
        return abs(self.rounded - self.exact)

    @property
    def relative(self) -> float:
        """As a share of the exact one; of 1, where that is zero."""
        return self.absolute / (abs(self.exact) or 1.0)

    @property
    def in_third_digits(self) -> float:
        """In units of the exact one's third significant digit: 0.01 for 4.47, 0.001 for 0.520.

        Zero has none: its third decimal stands for it.
        """
        exponent = math.floor(math.log10(abs(self.exact))) if self.exact else -1
        return self.absolute / 10.0 ** (exponent - 2)

    @property
    def third_digit_holds(self) -> bool:
        """It moves by less than one unit of it; NaN does not hold."""
        return self.in_third_digits < 1


def changes(levels: Mapping[str, Mapping[str, Mapping[str, float]]], dtype: str) -> list[Change]:
    """Of every level's metrics under ``dtype``, against fp32."""
    return [
        Change(level, name, exact, by_dtype[dtype][name])
        for level, by_dtype in levels.items()
        for name, exact in by_dtype["fp32"].items()
    ]


def verdict(found: Sequence[Change], dtype: str) -> str:
    """One line: whether every third digit holds, else where it does not; and the largest change."""
    moved = [f"{x.level} {x.metric}" for x in found if not x.third_digit_holds]
    largest = max(found, key=lambda change: change.relative)
    kept = (
        f"the third digit of all {len(found)} metrics holds"
        if not moved
        else f"the third digit of {len(moved)} of {len(found)} metrics does NOT hold "
        f"({', '.join(moved)})"
    )
    return (
        f"{dtype}: {kept}; the largest change is {largest.relative:.3%} "
        f"({largest.level} {largest.metric}: {largest.exact:.6g}, {largest.rounded:.6g})"
    )


def show(found: Mapping[str, Any]) -> None:
    print(f"\n{found['num_answers']} answers of {found['pair']}")
    print(f"{'':<6}  pairs MiB  of fp32  and index  visual MiB  us/answer")
    for dtype, size in found["stores"].items():
        print(
            f"{dtype:<6}{size['pair_bytes'] / 2**20:>11.2f}{size['over_fp32']:>9.4f}"
            f"{size['over_fp32_with_index']:>11.4f}{size['visual_bytes'] / 2**20:>12.2f}"
            f"{size['us_per_random_answer']:>11.1f}"
        )
    print(f"\n{'metric':<30}{'fp32':>10}" + "".join(_HEADS.format(x) for x in found["changes"]))
    for row in zip(*found["changes"].values(), strict=True):
        cells = "".join(
            f"{x.rounded:>12.6f}{x.relative:>9.3%}{'holds' if x.third_digit_holds else 'moves':>12}"
            for x in row
        )
        print(f"{row[0].level + ' ' + row[0].metric:<30}{row[0].exact:>10.6f}{cells}")
    print()
    for dtype, change in found["changes"].items():
        print(verdict(change, dtype))
    size = found["stores"]["bf16"]["over_fp32"]
    reached = "reached" if size <= SIZE_BAR else "NOT reached"
    print(f"bf16 pairs take {size:.4f} of fp32; the bar is {SIZE_BAR}: {reached}")


_HEADS = "{:>12}   change third digit"


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a JSON file."""
    told = {
        dtype: [
            {
                **asdict(change),
                "relative": change.relative,
                "third_digit_holds": change.third_digit_holds,
            }
            for change in changed
        ]
        for dtype, changed in found["changes"].items()
    }
    return {**found, "changes": told}


def log(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Keep the numbers in MLflow."""
    from xsd.tracking.run import stage_run

    values = {name: str(value) for name, value in vars(options).items()}
    with stage_run("benchmark_storage", options.pair, values) as run:
        for dtype, change in found["changes"].items():
            run.log({f"{dtype}.largest_change": max(x.relative for x in change)})
            run.log({f"{dtype}.third_digits_moved": sum(not x.third_digit_holds for x in change)})
        for dtype, size in found["stores"].items():
            run.log({f"{dtype}.over_fp32": size["over_fp32"]})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "storage.json"
            write_json(path, plain(found))
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
    parser.add_argument("--mlflow", action="store_true", help="log to MLflow")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    found["changes"] = {dtype: changes(found["levels"], dtype) for dtype in DTYPES[1:]}
    show(found)
    if options.json:
        write_json(options.json, plain(found))
    if options.mlflow:
        log(options, found)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except XsdError as error:
        print(f"storage.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
