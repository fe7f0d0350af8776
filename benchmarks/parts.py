"""Where the time of a plain answer goes, and how far each part is from what the machine allows.

The parts of ``decoding.decoded.PARTS`` are measured within whole answers, so they add up to the
wall time. Vision is split by the projector, which is timed by itself in the same rounds.

A part's floor is the longer of two times: its multiplications and additions (of matrix products
and attention, two a weight and row) at the best rate seen on this device (a library's product of
two large matrices, or the prefill's own), and its weights and KV at the rate of a copy. Weights
count once a pass. Nothing is added for norms, activations, resizing or calls: what lies above the
floor is theirs, and the kernels'.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from xsd.clock import interleaved
from xsd.decoding.decoded import LM_HEAD, PARTS, PASSES, PREFILL, VISION
from xsd.decoding.engine import Engine
from xsd.pairs.base import Decoder, Media

TOWER, PROJECTOR = "vision tower", "projector"
SIZE = 1024
"""Of the square matrices whose product says what the device can do."""

Row = dict[str, float | str]


class Bench(Protocol):
    """What ``engine.Bench`` has of it."""

    verifier: Decoder
    engine: Engine
    device: torch.device
    asked: list[tuple[Media, str]]

    def floor(self) -> dict[str, float]: ...


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
    """``rows``: part, ms of an answer (mean), gflop, mb and floor_ms (NaN: no floor is known);
    ``total_ms`` of an answer; ``gflop_per_s`` (the best; a library's beside it) and
    ``copy_gb_per_s`` of the device."""
    sums: dict[str, float] = {}
    project = _projector(bench)
    projector_ms: list[float] = []
    total_ms, num_tokens, num_answers = 0.0, 0, 0
    for repeat in range(repeats + 1):
        projector_ms += interleaved({PROJECTOR: project}, bench.device, 3, 1)[PROJECTOR]
        for asked in bench.asked:
            answer = bench.engine.plain(*asked)
            if repeat == 0:
                continue
            for part, ms in answer.parts.items():
                sums[part] = sums.get(part, 0.0) + ms
            total_ms += sum(answer.parts.values())
            num_tokens += len(answer.token_ids)
            num_answers += 1
    mean = {part: sums.get(part, 0.0) / num_answers for part in PARTS if part in sums}
    mean[PROJECTOR] = min(statistics.median(projector_ms), mean[VISION])
    mean[TOWER] = mean.pop(VISION) - mean[PROJECTOR]
    work = _work(bench, num_tokens / num_answers)
    library, own = _product_rate(bench), work[PREFILL][0] / mean[PREFILL] / 1e6
    gflop_per_s, copy_gb_per_s = max(library, own), bench.floor()["copy_gb_per_s"]
    order = [name for part in PARTS for name in ((TOWER, PROJECTOR) if part == VISION else (part,))]
    rows: list[Row] = []
    for part in (name for name in order if name in mean):
        flop, size = work.get(part, (float("nan"), float("nan")))
        floor_ms = max(flop / gflop_per_s / 1e6, size / copy_gb_per_s / 1e6)
        rows.append({"part": part, "ms": mean[part], "gflop": flop / 1e9, "mb": size / 1e6,
                     "floor_ms": floor_ms})  # fmt: skip
    return {
        "rows": rows,
        "total_ms": total_ms / num_answers,
        "num_tokens": num_tokens / num_answers,
        "gflop_per_s": gflop_per_s,
        "library_gflop_per_s": library,
        "copy_gb_per_s": copy_gb_per_s,
    }


def _work(bench: Bench, num_tokens: float) -> dict[str, tuple[float, float]]:
    """Of every part with products: operations and bytes of an answer of so many tokens."""
    verifier: Any = bench.verifier
    parts, media = verifier.model.model, bench.asked[0][0]
    tower, layers = parts.video_tower, parts.language_model.layers
    features = verifier.features(verifier.pixels(media).to(bench.device, verifier.stack.dtype))
    num_images, each, width = features.shape
    num_run = verifier.model.config.vision_feature_layer % (len(tower.encoder.layers) + 1)
    run = tower.encoder.layers[:num_run]
    num_rows = num_images * each
    prompt = verifier.prompt_embeddings(*bench.asked[0]).shape[1]
    inner = layers[0].self_attn.o_proj.in_features
    step_rows = num_tokens - 1
    middle = prompt + num_tokens / 2
    kv = bench.verifier.new_cache(1, 1).num_bytes
    seen = [*run, tower.embeddings.patch_embedding]
    head = verifier.lm_head.weight
    return {
        TOWER: (
            2 * _numel(seen) * num_rows + 4 * len(run) * num_images * each**2 * width,
            _nbytes(seen),
        ),
        PROJECTOR: (
            2 * _numel([parts.multi_modal_projector]) * num_rows,
            _nbytes([parts.multi_modal_projector]),
        ),
        # Causal: half of all pairs.
        PREFILL: (
            2 * _numel(layers) * prompt + 2 * len(layers) * prompt**2 * inner,
            _nbytes(layers) + kv * prompt,
        ),
        PASSES: (
            step_rows * (2 * _numel(layers) + 4 * len(layers) * middle * inner),
            step_rows * (_nbytes(layers) + kv * middle),
        ),
        LM_HEAD: (2 * head.numel() * num_tokens, head.nbytes * num_tokens),
    }


def _numel(modules: Sequence[Any]) -> int:
    return sum(w.numel() for module in modules for w in module.parameters() if w.dim() > 1)


def _nbytes(modules: Sequence[Any]) -> int:
    return sum(w.nbytes for module in modules for w in module.parameters())


@torch.inference_mode()
def _projector(bench: Bench) -> Callable[[], object]:
    verifier: Any = bench.verifier
    pixels = verifier.pixels(bench.asked[0][0]).to(bench.device, verifier.stack.dtype)
    features = verifier.features(pixels)

    @torch.inference_mode()
    def work() -> object:
        return verifier.model.model.multi_modal_projector(features)

    return work


def _product_rate(bench: Bench) -> float:
    """Billions of operations a second in a product of two large matrices."""
    device, dtype = bench.device, bench.verifier.stack.dtype
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    times = interleaved({"product": lambda: left @ right}, device, 15)["product"]
    return 2 * SIZE**3 / min(times) / 1e6


def show(found: Mapping[str, Any]) -> None:
    print(f"\nWhere the time of a plain answer goes ({found['num_tokens']:.1f} tokens, Markdown)\n")
    print("| part | ms | share | GFLOP | MB | floor, ms | times floor |")
    print("|---|---|---|---|---|---|---|")
    total_ms = found["total_ms"]
    for row in found["rows"]:
        line = f"| {row['part']} | {row['ms']:.2f} | {row['ms'] / total_ms:.0%} |"
        if row["floor_ms"] == row["floor_ms"]:
            times = f"{row['ms'] / row['floor_ms']:.1f}"
            line += f" {row['gflop']:.3f} | {row['mb']:.1f} | {row['floor_ms']:.2f} | {times} |"
        else:
            line += " - | - | - | - |"
        print(line)
    known = [row for row in found["rows"] if row["floor_ms"] == row["floor_ms"]]
    gflop, size, floor_ms = (
        sum(row[name] for row in known) for name in ("gflop", "mb", "floor_ms")
    )
    print(
        f"| sum | {total_ms:.2f} | 100% | {gflop:.3f} | {size:.1f} | {floor_ms:.2f} | "
        f"{total_ms / floor_ms:.1f} |"
    )
    print(
        f"\nFloor: the longer of GFLOP at {found['gflop_per_s']:.0f} a second (a library's product "
        f"of {SIZE} x {SIZE}: {found['library_gflop_per_s']:.0f}) and MB at "
        f"{found['copy_gb_per_s']:.1f} GB/s (a copy, read + written)"
    )
