"""Extraction against a faithful loop of the published kind, in one run, on any pair and device.

    python -m benchmarks.extraction                          # the tiny pair on a CPU
    python -m benchmarks.extraction --mlflow                 # the same, kept in MLflow
    python -m benchmarks.extraction --pair eventgpt-video-llava --weights random --device cuda

The published loop answers one question at a time: it decodes the clip's files, runs both image
processors and transformers' ``generate`` on both models, keeps the last layer's hidden states, and
writes padded fp32 chunks. Ours is ``xsd extract`` without its MLflow run. They take turns on the
same clips, and the files of both are written. Image processing is our own on both sides, which is
quicker than the library's: that favours the published loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from xsd.clock import PartTimes
from xsd.errors import XsdError
from xsd.files import write_json
from xsd.hidden.chunk import Chunk, write_chunk
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import clips_together, extract, header
from xsd.hidden.media import read_media
from xsd.hidden.plan import Batch, plan_batches
from xsd.hidden.sample import HiddenSample
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes
from xsd.scenes.dsec import load_index
from xsd.types import Sample, Scene

BAR = 6.0
"""On a CPU with the tiny pair."""


class PublishedLoop:
    """Batch 1, both models left to their own text, everything done anew for every question."""

    def __init__(self, pair: ModelPair, max_new_tokens: int) -> None:
        self.pair, self.max_new_tokens = pair, max_new_tokens
        self.times = PartTimes(pair.verifier.stack.device)
        self.num_threads = torch.get_num_threads()

    def warm_up(self, samples: Sequence[Sample], path: Path) -> None:
        """Threads that wait for each other can cost more than they do: take what is quickest."""
        seconds = {}
        for self.num_threads in sorted({1, torch.get_num_threads()}):
            self([samples[0]], path)
            start = time.perf_counter()
            self(samples, path)
            seconds[self.num_threads] = time.perf_counter() - start
        self.num_threads = min(seconds, key=lambda number: seconds[number])
        self.times.seconds.clear()

    def __call__(self, samples: Sequence[Sample], path: Path) -> int:
        """Answer, and write a chunk; number of answers."""
        all_threads = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        found = [self.answer(sample) for sample in samples]
        torch.set_num_threads(all_threads)
        with self.times.part("chunks"):
            write_chunk(Chunk.of(found, "fp32"), path)
        return len(found)

    @torch.inference_mode()
    def answer(self, sample: Sample) -> HiddenSample:
        pair = self.pair
        with self.times.part("reading"):
            media = read_media(sample.scene, pair.num_event_images, pair.num_frames)
        sides = []
        for role, decoder in (("drafter", pair.drafter), ("verifier", pair.verifier)):
            with self.times.part("reading"):
                pixels = decoder.pixels(media)
            with self.times.part(f"{role} generate"):
                sides.append(self.generate(decoder, pixels, sample.question))
        (drafter_ids, drafter_hidden), (verifier_ids, verifier_hidden) = sides
        return HiddenSample(sample.key, drafter_hidden, verifier_hidden, drafter_ids, verifier_ids)

    def generate(
        self, decoder: Decoder, pixels: torch.Tensor, question: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [T] and the states that predicted them [T, D], in host memory."""
        model: Any = decoder.model  # type: ignore[attr-defined]
        rows = decoder.embed_prompt(decoder.prompt(question), decoder.visual_tokens(pixels))
        eos = sorted(decoder.eos_ids)
        said = model.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0],
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        states = torch.cat([step[-1][:, -1] for step in said.hidden_states])
        return said.sequences[0, -len(states) :].cpu(), states.float().cpu()


class Ours:
    """``xsd extract`` of some batches, into a folder of its own."""

    def __init__(self, pair: ModelPair, config: ExtractConfig) -> None:
        self.pair, self.config = pair, config
        self.times: Counter[str] = Counter()
        self.num_halvings = 0

    def __call__(self, batches: Sequence[Batch], folder: Path) -> int:
        top = header(self.pair, batches, "train", self.config, "benchmark")
        num_answers = 0
        with HiddenWriter.open(folder, top, batches) as writer:
            for number, extracted in enumerate(extract(self.pair, batches, self.config)):
                writer.add(number, extracted)
                num_answers += len(extracted.samples)
                self.num_halvings += extracted.num_halvings
                self._add(extracted.seconds)
        self._add(writer.times.seconds)
        return num_answers

    def _add(self, seconds: Mapping[str, float]) -> None:
        for name, number in seconds.items():
            self.times[name] += number  # type: ignore[assignment]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """MiB at most while the block runs, in all: of the process, and of a GPU's allocator."""
    process, done = psutil.Process(), threading.Event()
    found = {"host": process.memory_info().rss / 2**20}

    def watch() -> None:
        while not done.wait(0.005):
            found["host"] = max(found["host"], process.memory_info().rss / 2**20)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        if device.type == "cuda":
            found["device"] = torch.cuda.max_memory_allocated(device) / 2**20


def measure(
    pair: ModelPair, scenes: Sequence[Scene], config: ExtractConfig, rounds: int, per_round: int
) -> dict[str, Any]:
    """Both ways in turn: ours on all clips of a round, the published loop on some of them."""
    loop, ours = PublishedLoop(pair, config.max_new_tokens), Ours(pair, config)
    device = pair.verifier.stack.device
    together = clips_together(pair, config)
    size = len(scenes) // rounds
    sides: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "answers": [], "peak": {}} for name in ("published", "ours")
    }

    def timed(name: str, work: Any, *given: Any) -> None:
        with peak_memory(device) as peak:
            start = time.perf_counter()
            number = work(*given)
            sides[name]["seconds"].append(time.perf_counter() - start)
        sides[name]["answers"].append(number)
        for what, amount in peak.items():
            sides[name]["peak"][what] = max(sides[name]["peak"].get(what, 0.0), amount)

    with tempfile.TemporaryDirectory() as written:
        root = Path(written)
        # What is compiled at its first use has been used once.
        warm = plan_batches(scenes[:1], "train", dataclasses.replace(config, max_questions=3), 1)
        loop.warm_up(warm[0].samples, root / "warm.pt")
        ours(warm, root / "warm")
        ours.times.clear()
        for number in range(rounds):
            clips = scenes[number * size : (number + 1) * size]
            batches = plan_batches(clips, "train", config, together)
            asked = [sample for batch in batches for sample in batch.samples]
            some = asked[: per_round * len(asked) // len(clips)]
            timed("published", loop, some, root / f"{number}.pt")
            timed("ours", ours, batches, root / str(number))
            store = HiddenStore.open(root / str(number))
            sides["ours"].setdefault("bytes", []).append(size_of(store))
    for name, times in (("published", loop.times.seconds), ("ours", ours.times)):
        total = sum(sides[name]["seconds"])
        sides[name]["pairs_per_second"] = sum(sides[name]["answers"]) / total
        sides[name]["share"] = {part: seconds / total for part, seconds in times.items()}
    per_pair = [
        [t / n for t, n in zip(sides[name]["seconds"], sides[name]["answers"], strict=True)]
        for name in ("published", "ours")
    ]
    pair_bytes = Counter[str]()
    for counted in sides["ours"].pop("bytes"):
        pair_bytes.update(counted)
    return {
        **sides,
        "threads": {"published": loop.num_threads, "ours": torch.get_num_threads()},
        "clips_together": together,
        "num_halvings": ours.num_halvings,
        "ratio": sides["ours"]["pairs_per_second"] / sides["published"]["pairs_per_second"],
        "ratio_by_round": [a / b for a, b in zip(*per_pair, strict=True)],
        "bytes": dict(pair_bytes),
    }


def size_of(store: HiddenStore) -> dict[str, int]:
    """Bytes on disk, and those that real positions would take in fp32."""
    positions = [(len(s.drafter_ids), len(s.verifier_ids)) for s in store]
    fp32 = sum(4 * (d * store.d_drafter + v * store.d_verifier) for d, v in positions)
    return {
        "pairs": store.num_bytes,
        "index": (store.path / "index.json").stat().st_size,
        "visual": store.num_visual_bytes,
        "fp32": fp32,
    }


def show(found: Mapping[str, Any], is_tiny_cpu: bool) -> None:
    print(f"\n{'':<12}{'pairs':>7}{'pairs/s':>10}{'peak MiB':>10}  share of the wall clock")
    for name in ("published", "ours"):
        side = found[name]
        shares = ", ".join(
            f"{part} {share:.0%}"
            for part, share in sorted(side["share"].items(), key=lambda item: -item[1])
        )
        peak = side["peak"].get("device", side["peak"]["host"])
        number = sum(side["answers"])
        print(f"{name:<12}{number:>7}{side['pairs_per_second']:>10.2f}{peak:>10.0f}  {shares}")
    print(f"threads: {found['threads']['published']} (the quickest) and {found['threads']['ours']}")
    print("(of ours, reading and chunks go on in the background; waiting is for reading)")
    rounds = ", ".join(f"{ratio:.1f}" for ratio in found["ratio_by_round"])
    print(f"\nratio: {found['ratio']:.2f} times as many pairs per second (rounds: {rounds})")
    if is_tiny_cpu:
        print(f"bar: at least {BAR:g}: {'reached' if found['ratio'] >= BAR else 'NOT reached'}")
    sizes = found["bytes"]
    print(
        f"store: pairs with ids {sizes['pairs'] / sizes['fp32']:.4f} of the fp32 bytes of real "
        f"positions, with the index {(sizes['pairs'] + sizes['index']) / sizes['fp32']:.4f} "
        f"(claim: at most 0.52); visual states of clips {sizes['visual'] / 2**20:.2f} MiB"
    )


def log(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Keep the numbers in MLflow."""
    from xsd.tracking.run import stage_run

    values = {name: str(value) for name, value in vars(options).items()}
    with stage_run("benchmark_extraction", options.pair, values) as run:
        run.log(
            {
                "measured.extraction.ratio": found["ratio"],
                "measured.extraction.pairs_per_second": found["ours"]["pairs_per_second"],
                "measured.extraction.published_pairs_per_second": found["published"][
                    "pairs_per_second"
                ],
                "bytes_over_fp32": found["bytes"]["pairs"] / found["bytes"]["fp32"],
                **{
                    f"measured.extraction.{name}_peak_mib": found[name]["peak"]["host"]
                    for name in ("ours", "published")
                },
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "extraction.json"
            write_json(path, found)
            run.artifact(path)
        print(f"kept: {run.link()}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for field in dataclasses.fields(PairConfig):
        parser.add_argument(
            f"--{field.name}",
            default=field.default,
            type=int if field.name == "num_event_images" else str,
        )
    parser.add_argument("--dataset_dir", type=Path, help="scenes; else synthetic ones are made")
    parser.add_argument("--conditioning", default="teacher_forced")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--max_questions", type=int, default=10)
    parser.add_argument("--batch_clips", type=int)
    parser.add_argument("--num_clips", type=int, default=48, help="ours answers them all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--published_clips", type=int, default=2, help="of a round's")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--mlflow", action="store_true", help="log to MLflow")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = {field.name for field in dataclasses.fields(PairConfig)}
    pair = load_pair(PairConfig(**{k: v for k, v in vars(options).items() if k in names}))
    config = ExtractConfig(
        conditioning=options.conditioning,
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        max_questions=options.max_questions,
        batch_clips=options.batch_clips,
    )
    if options.num_clips < options.rounds:
        raise XsdError(f"--num_clips {options.num_clips}: at least one a round is needed")
    device = pair.verifier.stack.device
    print(f"{pair.name}, {pair.quant}, {device}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as made:
        folder = options.dataset_dir or Path(made)
        if options.dataset_dir is None:
            wanted = ScenesConfig(
                output_dir=folder, num_train=options.num_clips, num_val=0, num_test=0
            )
            for _ in make_scenes(wanted):
                pass
        scenes = [scene for scene in load_index(folder) if scene.split == "train"]
        scenes = scenes[: options.num_clips]
        found = measure(pair, scenes, config, options.rounds, options.published_clips)
    found |= {"pair": pair.name, "quant": pair.quant, "device": str(device)}
    show(found, pair.name == "tiny" and device.type == "cpu")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.mlflow:
        log(options, found)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except XsdError as error:
        print(f"extraction.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
