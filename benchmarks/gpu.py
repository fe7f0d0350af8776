"""What only a GPU shows, at 7B shapes unless said; ``engine.py`` has passes, peer and formula.

    python -m benchmarks.gpu --only plans                     # NF4 launches against each other
    python -m benchmarks.gpu --only steps --quant 4bit        # captured against bitsandbytes
    python -m benchmarks.gpu --only hiding,gap                # a second GPU is used where it is
    python -m benchmarks.gpu --only loading --folder /tmp/x   # checkpoints are written there
    python -m benchmarks.gpu --only processor

Every number is a median over interleaved rounds; ``--json`` takes them all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import engine
from xsd.clock import Stopwatch, interleaved
from xsd.decoding.accept import Draft
from xsd.decoding.speculator import LocalSpeculator
from xsd.decoding.streams import StreamSpeculator
from xsd.errors import XsdError
from xsd.pairs.base import Media
from xsd.pairs.catalog import load_drafter, load_pair
from xsd.pairs.config import PairConfig
from xsd.types import Span, Strategy

ROWS = (1, 2, 4, 8, 16, 22, 32, 48, 64)
SEED_L4 = {0: 1.0, 6: 0.69, 12: 0.19, 24: 0.004}
"""Share of the published L4's states within accept@0.90, by answer position (full test set)."""
SHAPES = {
    "qkv": (12288, 4096),
    "gate_up": (22016, 4096),
    "out": (4096, 4096),
    "down": (4096, 11008),
}
PLANS = [
    (outs, blocks, True, warps, stages)
    for outs, blocks, warps, stages in itertools.product((32, 64), (1, 2, 4), (4,), (3, 5))
] + [(16, 4, True, 4, 4), (64, 2, True, 8, 4), (128, 2, True, 8, 4), (64, 2, False, 4, 4)]
"""Outputs, blocks, in registers, warps, stages."""


# ---------------------------------------------------------------- NF4 launches


def plans(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every launch, of weights that no cache holds."""
    from xsd.pairs.four_bit_kernels import project_four_bit
    from xsd.pairs.launch import Chip, FourBitPlan

    device = torch.device("cuda")
    chip, found = Chip.of(device), {}
    jobs = list(itertools.product(SHAPES, (1, 22), PLANS))
    for index, (shape, rows, plan) in enumerate(jobs):
        if options.part is not None and index % options.parts != options.part:
            continue
        num_outs, num_ins = SHAPES[shape]
        count = 1 if options.part is not None else -(-(200 << 20) // (num_outs * num_ins // 2))
        weights = [_random_weight(num_outs, num_ins, device) for _ in range(count)]
        x = torch.randn(rows, num_ins, device=device, dtype=torch.bfloat16)
        outs, blocks, by_bits, warps, stages = plan
        launch = FourBitPlan(
            max(16, 1 << (rows - 1).bit_length()), outs, blocks, by_bits, warps, stages
        )
        gated = shape == "gate_up"
        how: dict[str, Any] = {"gated": gated, "plan": launch, "norm": x[0], "eps": 1e-5}
        try:
            said = project_four_bit(x, weights[0], chip, **how)
            if options.part is not None:
                continue
            ms = _graphed_ms(partial(_all_products, x, weights, chip, how))
        except Exception as error:  # noqa: BLE001 - a launch that does not fit is a finding
            found[f"{shape} {rows} {plan}"] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        found[f"{shape} {rows} {plan}"] = ms / count
        exact = _reference(x, weights[0], gated)
        apart = float((said.double() - exact).norm() / exact.norm())
        assert apart < 0.02, f"{shape} {rows} {plan}: {apart}"
    for shape, rows in itertools.product(SHAPES, (1, 22)):
        mine = {k: v for k, v in found.items() if k.startswith(f"{shape} {rows} ")}
        best = sorted((v, k) for k, v in mine.items() if isinstance(v, float))[:4]
        size = SHAPES[shape][0] * SHAPES[shape][1] * (0.5 + 1 / 64)
        for ms, name in best:
            print(f"  {name:<44}{1e3 * ms:7.1f} us  {size / ms / 1e9:.2f} TB/s")
    return found


def _all_products(x: torch.Tensor, weights: Sequence[Any], chip: Any, how: dict[str, Any]) -> None:
    from xsd.pairs.four_bit_kernels import project_four_bit

    for weight in weights:
        project_four_bit(x, weight, chip, **how)


def _random_weight(num_outs: int, num_ins: int, device: torch.device) -> Any:
    from xsd.pairs.four_bit import FourBitWeight
    from xsd.pairs.look_up import NF4

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, device=device, dtype=torch.uint8)

    scales = torch.rand(num_ins // 64, num_outs, device=device) / num_ins**0.5
    packed = draw(num_outs, num_ins // 2)
    return FourBitWeight(packed, scales.half(), torch.tensor(NF4, device=device))


def _reference(x: torch.Tensor, weight: Any, gated: bool) -> torch.Tensor:
    wide = x.double()
    normed = torch.nn.functional.rms_norm(wide, (x.shape[1],), wide[0], 1e-5)
    full = normed @ weight.restore().double().t()
    if not gated:
        return full
    gate, up = full.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _graphed_ms(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of a replay, by the device's clock."""
    from xsd.pairs.capture import Capture, Lane

    capture = Capture(work, Lane(torch.device("cuda")))
    times = []
    for _ in range(repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        capture.replay()
        marks[1].record()
        marks[1].synchronize()
        times.append(marks[0].elapsed_time(marks[1]))
    return statistics.median(times)


# ---------------------------------------------------------------- passes against the library's


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """V(r) as captured and as the library's modules run it, in turn; and the step's floor."""
    bench = _bench(options)
    decoder, stack = bench.verifier, bench.verifier.stack
    graphs = stack.graphs  # type: ignore[attr-defined]
    cache, length = bench.caches["verifier"], bench.middle("verifier")

    def eager(num_rows: int) -> Callable[[], object]:
        ids = list(range(5, 5 + num_rows))

        @torch.inference_mode()
        def work() -> None:
            cache.length = length
            rows = decoder.embed(torch.tensor([ids], device=bench.device))
            decoder.choose(graphs.eager.run(rows, cache)[0])

        return work

    tasks = {f"V({rows})": bench.verify("verifier", rows) for rows in ROWS}
    if graphs is not None:
        tasks |= {f"eager V({rows})": eager(rows) for rows in ROWS}
    times = interleaved(tasks, bench.device, options.repeats, settle=1)
    floor = bench.floor()
    middle = {name: statistics.median(found) for name, found in times.items()}
    one = middle["V(1)"]
    print(f"  floor {floor['floor_ms']:.3f} ms; V(1) is {one / floor['floor_ms']:.2f} times it")
    for rows in ROWS:
        name = f"V({rows})"
        line = f"  {name:<6}{engine.spread(times[name])}  {middle[name] / one:.2f} t"
        if f"eager V({rows})" in middle:
            ratio = middle[f"eager V({rows})"] / middle[f"V({rows})"]
            line += f"   eager {middle[f'eager V({rows})']:8.2f}  {ratio:.1f} times ours"
        print(line)
    apart = _agreement(bench, graphs) if graphs is not None else {}
    print(f"  captured against eager, logits of 22 rows: {apart}")
    return {"floor": floor, "times_ms": times, "apart": apart}


@torch.inference_mode()
def _agreement(bench: engine.Bench, graphs: Any) -> dict[str, float]:
    decoder, cache = bench.verifier, bench.caches["verifier"]
    length = bench.prompts["verifier"].shape[1]
    ids, found = list(range(5, 27)), []
    for is_captured in (True, False):
        cache.length = length
        if is_captured:
            logits = decoder.read(ids, cache).logits().clone()
        else:
            rows = decoder.embed(torch.tensor([ids], device=bench.device))
            logits = decoder.logits(graphs.eager.run(rows, cache)[0])
        found.append(logits.float())
    return {
        "relative": float((found[0] - found[1]).norm() / found[1].norm()),
        "same_argmax": float((found[0].argmax(-1) == found[1].argmax(-1)).float().mean()),
    }


# ---------------------------------------------------------------- both prefills at once


def hiding(options: argparse.Namespace) -> dict[str, Any]:
    """Both prefills alone and together; the drafts that are ready when the verifier's ends."""
    bench = _bench(options)
    strategy = Strategy("drafter+VL", gap="drafter", gap_mode="free")
    drafters = {"one GPU": bench.drafter}
    if torch.cuda.device_count() > 1:
        config = PairConfig(
            **{**_pair_values(options), "device_map": "drafter=cuda:1,verifier=cuda:0"}
        )
        drafters["two GPUs"] = load_drafter(config, bench.verifier.vocab_size)
    parties: dict[str, Any] = {}
    for name, drafter in drafters.items():
        device = drafter.stack.device
        for way in ("alone", "beside"):
            local = LocalSpeculator(
                strategy, drafter, bench.tables, {}, {}, max_new_tokens=options.max_new_tokens,
                max_prompt=bench.max_prompt, max_gap_drafts=22,
            )  # fmt: skip
            parties[f"{name}, {way}"] = local if way == "alone" else StreamSpeculator(local, device)
    low = StreamSpeculator(parties["one GPU, alone"], bench.device)
    if low._stream is not None:
        low._stream = torch.cuda.Stream(bench.device)
        parties["one GPU, beside, equal priority"] = low
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *parties)}
    order = list(rows)
    for repeat in range(options.repeats + 2):
        random.Random(repeat).shuffle(order)
        for asked, name in itertools.product(bench.asked, order):
            if name == "plain":
                found = {"prefill_ms": bench.engine.plain(*asked).prefill_ms}
            else:
                decoded = bench.engine.speculate(*asked, parties[name], 0)
                (span,) = (
                    s for s in decoded.timeline if (s.lane, s.what) == ("drafter", "prefill")
                )
                found = {
                    "prefill_ms": decoded.prefill_ms,
                    "drafter_ms": span.end_ms - span.start_ms,
                    "wall_ms": max(decoded.prefill_ms, span.end_ms),
                    "num_free": decoded.num_free,
                    "total_ms": decoded.total_ms,
                }
            if repeat >= 2:
                rows[name].append(found)
    middle = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for name, found in rows.items()
    }
    alone = middle["plain"]["prefill_ms"]
    print(f"  verifier's prefill alone {alone:.2f} ms")
    for name, found in middle.items():
        if "beside" not in name:
            continue
        beside = middle[f"{name.partition(',')[0]}, alone"]["drafter_ms"]
        kappas = found["prefill_ms"] / alone, found["drafter_ms"] / beside
        print(
            f"  {name}: verifier {found['prefill_ms']:.2f} (kappa {kappas[0]:.2f}), drafter "
            f"{found['drafter_ms']:.2f} (kappa {kappas[1]:.2f}), both after {found['wall_ms']:.2f} "
            f"= {found['wall_ms'] / max(alone, beside):.3f} of the longer, "
            f"{found['num_free']:.0f} drafts ready"
        )
    return {"median": middle, "rows": rows}


# ---------------------------------------------------------------- the gap against its formula


class _SeedGap:
    """Drafts of which the first K hold, K drawn by the published acceptance by position."""

    wants_projected = wants_prefilled = False

    def __init__(self, answer: Sequence[int], vocab_size: int, seed: int, size: int = 22) -> None:
        draw = random.Random(seed)
        chance = draw.random()
        keys = sorted(SEED_L4)

        def held(i: int) -> float:
            last = max(k for k in keys if k <= i)
            after = next((k for k in keys if k > i), last)
            share = (i - last) / max(1, after - last)
            return SEED_L4[last] * (1 - share) + SEED_L4[after] * share

        num_held = next((i for i in range(size) if held(i) < chance), size)
        self.drafts = [
            token if i < num_held else (token + 1) % vocab_size
            for i, token in enumerate(answer[:size])
        ]

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        """Nothing to do."""

    def gap_drafts(self) -> Draft:
        return Draft(self.drafts)

    def propose(self, tokens: Sequence[int], states: torch.Tensor, gamma: int) -> Draft:
        return Draft([])

    def finish(self) -> list[Span]:
        return []


def gap(options: argparse.Namespace) -> dict[str, Any]:
    """Decode speedup at the published L4's acceptance, beside what costs and counts give."""
    bench = _bench(options)
    total = {"plain_ms": 0.0, "spent_ms": 0.0, "formula_plain_ms": 0.0, "formula_ms": 0.0}
    works = {str(rows): bench.verify("verifier", rows) for rows in (1, *range(2, 24))}
    accepted = []
    for index, asked in enumerate(bench.asked):
        plain = bench.engine.plain(*asked)
        for seed in range(8):
            party = _SeedGap(plain.token_ids, bench.verifier.vocab_size, 100 * index + seed)
            times: dict[str, list[float]] = {"plain": [], "spent": []}
            for _ in range(3):
                times["plain"].append(bench.engine.plain(*asked).decode_ms)
                decoded = bench.engine.speculate(*asked, party, 0)
                times["spent"].append(decoded.decode_ms)
            costs = {
                rows: statistics.median(found)
                for rows, found in interleaved(works, bench.device, 3, 1, settle=1).items()
            }
            assert decoded.token_ids == plain.token_ids
            num, held = len(plain.token_ids), decoded.gap_accepted
            rows = decoded.gap_drafted
            accepted.append(held)
            total["plain_ms"] += statistics.median(times["plain"])
            total["spent_ms"] += statistics.median(times["spent"])
            total["formula_plain_ms"] += (num - 1) * costs["1"]
            # Draft 0 is checked by the prefill; where it holds, one pass checks the others.
            checked = costs[str(rows)] if held and rows > 1 else 0.0
            said = 1 + held if held else 1
            total["formula_ms"] += checked + max(0, num - said) * costs["1"]
    measured = total["plain_ms"] / total["spent_ms"]
    formula = total["formula_plain_ms"] / total["formula_ms"]
    print(
        f"  seed's L4 by position: {statistics.mean(accepted):.2f} of 22 held; decode measured "
        f"{measured:.3f}, formula {formula:.3f} ({measured / formula - 1:+.1%})"
    )
    return {**total, "accepted": accepted}


# ---------------------------------------------------------------- loading, and the processor


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of loading full-size checkpoints from disk."""
    from xsd.pairs import eventgpt, video_llava
    from xsd.pairs.checkpoint import Placement, draw_weights, load_weights

    root = Path(options.folder)
    device = torch.device(options.device)
    found: dict[str, Any] = {}
    kinds: list[tuple[str, Any, Any]] = [
        ("EventGPT", eventgpt.EventGPT, eventgpt),
        ("Video-LLaVA", video_llava.VideoLlava, video_llava),
    ]
    for name, model_class, module in kinds:
        settings, processing = module.published_config()
        began = time.perf_counter()
        model = draw_weights(model_class, settings, Placement("bf16", device))
        module.save(model, processing, root / name)
        found[f"{name} written"] = {"seconds": time.perf_counter() - began}
        del model
        for quant in ("bf16", "4bit"):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            model = load_weights(model_class, settings, root / name, Placement(quant, device))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            kept = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
            found[f"{name} {quant}"] = {
                "seconds": seconds, "peak_gib": peak / (1 << 30), "kept_gib": kept / (1 << 30),
                "host_peak_gib": host,
            }  # fmt: skip
            print(
                f"  {name} {quant}: {seconds:.1f} s, GPU peak {peak / (1 << 30):.2f} GiB, kept "
                f"{kept / (1 << 30):.2f}, host's peak so far {host:.1f} GiB"
            )
            del model
        shutil.rmtree(root / name)
    return found


def processor(options: argparse.Namespace) -> dict[str, Any]:
    """Largest difference between our frames' pixel values and transformers' video processor's."""
    from transformers import VideoLlavaVideoProcessor

    from xsd.pairs.video_llava import published_config

    _, ours = published_config()
    theirs = VideoLlavaVideoProcessor(do_sample_frames=False)
    found: dict[str, Any] = {}
    for height, width in ((480, 640), (224, 224), (300, 200)):
        frames = torch.randint(0, 256, (8, height, width, 3), dtype=torch.uint8)
        smooth = torch.nn.functional.avg_pool2d(
            frames.permute(0, 3, 1, 2).float(), 9, 1, 4, count_include_pad=False
        )
        for name, video in (("noise", frames), ("smooth", smooth.byte().permute(0, 2, 3, 1))):
            mine = ours(video.numpy())
            said = theirs(video.permute(0, 3, 1, 2), return_tensors="pt")["pixel_values_videos"][0]
            apart = (mine - said).abs()
            step = 1 / (255 * min(ours.std))
            found[f"{height}x{width} {name}"] = {
                "largest": float(apart.max()), "mean": float(apart.mean()),
                "largest_in_levels": float(apart.max()) / step,
            }  # fmt: skip
            print(
                f"  {height}x{width} {name}: largest {float(apart.max()):.4f} "
                f"({float(apart.max()) / step:.1f} of 255 levels), mean {float(apart.mean()):.5f}"
            )
    return found


# ---------------------------------------------------------------- the command

_loaded: dict[str, engine.Bench] = {}


def _pair_values(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "pair": options.pair, "weights": options.weights, "quant": options.quant,
        "device": options.device,
    }  # fmt: skip


def _bench(options: argparse.Namespace) -> engine.Bench:
    """The pair, loaded once a process."""
    if "bench" not in _loaded:
        config = PairConfig(**_pair_values(options))
        _loaded["bench"] = engine.Bench(load_pair(config), config, options)
    return _loaded["bench"]


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "plans": plans, "steps": steps, "hiding": hiding, "gap": gap, "loading": loading,
    "processor": processor,
}  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="steps,hiding,gap,processor")
    parser.add_argument("--pair", default="eventgpt-video-llava")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--quant", default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--num_samples", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--noise", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", default="checkpoints", help="of section loading")
    parser.add_argument("--part", type=int, help="compile this part of the plans, time nothing")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    options.adapter = None
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    print(f"gpu.py on {name}, torch {torch.__version__}: {' '.join(argv)}")
    numbers: dict[str, Any] = {"device": name, "torch": torch.__version__, "argv": list(argv)}
    for section in options.only.split(","):
        print(section)
        numbers[section] = SECTIONS[section](options)
        if options.json:
            options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except XsdError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
