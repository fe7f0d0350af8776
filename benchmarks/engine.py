"""The decoding engine against its floor, its peer and its formula, at any size, on any device.

    python -m benchmarks.engine                                   # the tiny pair on a CPU
    python -m benchmarks.engine --pair eventgpt-video-llava --weights random --device cuda

Everything that is compared is measured in turn within one process. No number here depends on
how good a drafter is: drafts hold at given rates (control ``synthetic``).

formula prints two differences: with what a cycle costs beside its pass, fitted at rates of 0 and 1,
they prove that counts alone make the speedups between; without, how much the passes explain.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import formula, parts
from xsd.adapters import checkpoint
from xsd.adapters.catalog import build
from xsd.adapters.config import AdapterConfig
from xsd.clock import Stopwatch, interleaved
from xsd.decoding.config import DecodingConfig
from xsd.decoding.engine import Engine
from xsd.decoding.graphs import head_drafter
from xsd.decoding.overlap import DrafterProcess, ProcessSpeculator, WorkerSetup
from xsd.decoding.speculator import LocalSpeculator, Speculator
from xsd.decoding.streams import StreamSpeculator
from xsd.decoding.tables import VerifierTables
from xsd.errors import XsdError
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.pairs.peer import Peer
from xsd.scenes.questions import QUESTIONS
from xsd.types import Span, Strategy

ROWS = range(1, 65)
MEASUREMENTS = ("passes", "breakdown", "overhead", "peer", "contention", "formula")
MAX_COPY_BYTES = 1 << 30
UNFIT = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NotImplementedError)
"""What transformers raises where two models cannot assist each other."""

Times = dict[str, list[float]]


class Bench:
    """A loaded pair, some clips, and what is measured on them."""

    def __init__(self, pair: ModelPair, config: PairConfig, options: argparse.Namespace) -> None:
        self.pair, self.config, self.options = pair, config, options
        self.verifier, self.drafter = pair.verifier, pair.drafter
        self.device = pair.verifier.stack.device
        self.asked = [
            (media, QUESTIONS[index % len(QUESTIONS)])
            for index, media in enumerate(clips(options.num_samples, options.noise))
        ]
        self.prompts = {
            role: decoder.prompt_embeddings(*self.asked[0])
            for role, decoder in (("verifier", self.verifier), ("drafter", self.drafter))
        }
        # Questions differ by some tokens.
        self.max_prompt = max(rows.shape[1] for rows in self.prompts.values()) + 64
        self.engine = Engine(self.verifier, options.max_new_tokens, self.max_prompt)
        self.halves = {"verifier": self.verifier, "drafter": self.drafter}
        # One a half for all that is timed: at full size a cache is a gigabyte.
        self.caches = {
            role: decoder.new_cache(1, self.max_prompt + options.max_new_tokens + max(ROWS))
            for role, decoder in self.halves.items()
        }
        for role in self.halves:
            self.prefill(role)()
        self.tables = VerifierTables.of(self.verifier)

    # ------------------------------------------------------------ passes and steps

    def passes(self) -> Times:
        """V(r), steps and prefills, of the first clip, in the middle of an answer."""
        media, _ = self.asked[0]
        pixels = {role: decoder.pixels(media) for role, decoder in self.halves.items()}
        # By device: a stopwatch waits for one.
        tasks: dict[torch.device, dict[str, Callable[[], object]]] = {}
        for role, decoder in self.halves.items():
            own = tasks.setdefault(decoder.stack.device, {})
            own[f"{role} pixels"] = lambda d=decoder: d.pixels(media)
            own[f"{role} vision"] = lambda d=decoder, r=role: d.visual_tokens(pixels[r])
            own[f"{role} prefill"] = self.prefill(role)
        tasks[self.drafter.stack.device]["drafter step"] = self.verify("drafter", 1)
        own = tasks[self.device]
        own |= {f"V({rows})": self.verify("verifier", rows) for rows in ROWS}
        for gamma in (1, 4):
            own[f"head chain of {gamma}"] = self.head_chain(gamma)
        times: Times = {}
        for device, own in tasks.items():
            times |= interleaved(own, device, self.options.repeats, settle=1)
        return times

    def prefill(self, role: str) -> Callable[[], object]:
        decoder, rows, cache = self.halves[role], self.prompts[role], self.caches[role]

        @torch.inference_mode()
        def work() -> None:
            cache.reset()
            state = decoder.forward(rows, cache)[0, -1]
            decoder.choose(state[None])

        return work

    def verify(self, role: str, num_rows: int) -> Callable[[], object]:
        """One pass of the engine's: tokens in, tokens out."""
        decoder, cache = self.halves[role], self.caches[role]
        length = self.middle(role)
        if role == "verifier":
            return self.engine.timed_pass(num_rows, length)
        ids = list(range(5, 5 + num_rows))

        @torch.inference_mode()
        def work() -> None:
            # What lies between the prompt and there is old rows: as long to read as new ones.
            cache.length = length
            decoder.read(ids, cache).choose()

        return work

    def middle(self, role: str) -> int:
        """Positions before the middle of an answer."""
        return self.prompts[role].shape[1] + self.options.max_new_tokens // 2

    def head_chain(self, gamma: int) -> Callable[[], object]:
        """Drafts of a head (E1: trained ones where given; weights do not change its time)."""
        if self.options.adapter:
            head, _ = checkpoint.load(self.options.adapter, expect_level="E1")
        else:
            width = self.verifier.width
            sizes = {"ffn_dim": 2 * width, "num_heads": 4} if width < 1024 else {}
            head = build(
                AdapterConfig(level="E1", d_drafter=self.drafter.width, d_verifier=width, **sizes)
            )
        head = head.to(self.device, self.verifier.stack.dtype).eval()
        party = head_drafter(head, self.tables, self.options.max_new_tokens)
        party.begin(self.asked[0][1], None, None)
        tokens = list(range(5, 25))
        states = torch.randn(
            20, self.verifier.width, device=self.device, dtype=self.verifier.stack.dtype
        )
        with torch.inference_mode():
            party.propose(tokens, states, 1)
        # As in a cycle that accepted one draft.
        return lambda: party.propose(tokens, states[-2:], gamma)

    # ------------------------------------------------------------ plain decoding and its peer

    def against_peer(self) -> dict[str, Any]:
        """Whole answers, processor included: ours, and transformers' plain and assisted ones."""
        limit = self.options.max_new_tokens
        try:
            peer = Peer(self.verifier)
        except XsdError as error:
            return {"refused": {"generate": str(error)}}
        ways: dict[str, dict[str, Any]] = {
            "generate": {},
            "generate, assisted by the drafter": {
                "assistant_model": getattr(self.drafter, "model", None),
                "tokenizer": self.verifier.tokenizer,
                "assistant_tokenizer": self.drafter.tokenizer,
            },
            "generate, assisted by prompt lookup": {"prompt_lookup_num_tokens": 4},
        }

        def theirs(media: Media, question: str, new: int = limit, **how: Any) -> list[int]:
            return peer.answer(self.verifier.pixels(media), question, new, **how)

        refused, same = {}, {}
        ours = [self.engine.plain(*asked).token_ids for asked in self.asked]
        for name, how in list(ways.items()):
            try:
                said = [theirs(*asked, **how) for asked in self.asked]
                same[name] = sum(a == b for a, b in zip(said, ours, strict=True))
            except UNFIT as error:
                refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                del ways[name]
        one = Engine(self.verifier, 1, self.max_prompt)
        times: dict[str, Times] = {}
        for index, asked in enumerate(self.asked):
            tasks: dict[str, Callable[[], object]] = {
                "ours": partial(self.engine.plain, *asked),
                "ours, first": partial(one.plain, *asked),
            }
            tasks |= {name: partial(theirs, *asked, **how) for name, how in ways.items()}
            if "generate" in ways:
                tasks["generate, first"] = partial(theirs, *asked, new=1)
            # A GPU captures what comes a second time: not in a measured round.
            rounds = self.options.repeats // 3 + 1
            times[str(index)] = interleaved(tasks, self.device, rounds, warmup=3)
        num_tokens = [len(ids) for ids in ours]
        return {"times": times, "same": same, "refused": refused, "num_tokens": num_tokens}

    # ------------------------------------------------------------ both at once

    def contention(self) -> dict[str, float]:
        """kappa: each side's prefill while the other works, over its prefill alone: the same
        drafting party, and the same calls of the engine, with and without the other side."""
        strategy = Strategy("drafter+VL", gap="drafter", gap_mode="free")
        nobody = self.party(Strategy("template+VL", gap="template", gap_mode="free"), None)
        alone: Times = {"verifier": [], "drafter": []}
        both: Times = {"verifier": [], "drafter": []}
        with self.beside(strategy) as party:
            for _ in range(self.options.repeats // 3 + 2):
                for asked in self.asked:
                    # Behind an answer of the verifier each, so that all find the same caches.
                    alone["verifier"].append(self.engine.speculate(*asked, nobody, 0).prefill_ms)
                    party.start(*asked, Stopwatch(self.device))
                    # At once, so that it ends where its prefill does.
                    alone["drafter"].append(drafter_prefill_ms(party.finish()))
                    alone["verifier"].append(self.engine.speculate(*asked, nobody, 0).prefill_ms)
                    decoded = self.engine.speculate(*asked, party, 0)
                    both["verifier"].append(decoded.prefill_ms)
                    both["drafter"].append(drafter_prefill_ms(decoded.timeline))
        return {
            role: statistics.median(both[role]) / statistics.median(alone[role]) for role in alone
        }

    @contextmanager
    def beside(self, strategy: Strategy) -> Iterator[Speculator]:
        """A party whose drafter works beside the verifier: in a process, or on a stream."""
        if self.device.type == "cuda":
            yield StreamSpeculator(self.party(strategy, None), self.drafter.stack.device)
            return
        decoding = DecodingConfig(max_new_tokens=self.options.max_new_tokens)
        image_bytes = max(sum(i.nbytes for i in media.event_images) for media, _ in self.asked)
        setup = WorkerSetup(
            self.config, {}, decoding, self.max_prompt, image_bytes=image_bytes, num_threads=1
        )
        with DrafterProcess(setup, self.drafter, self.verifier) as process:
            yield ProcessSpeculator(strategy, process, None)

    def party(self, strategy: Strategy, head: Any) -> LocalSpeculator:
        return LocalSpeculator(
            strategy, self.drafter, self.tables, {}, {}, head=head,
            max_new_tokens=self.options.max_new_tokens, max_prompt=self.max_prompt,
            max_gap_drafts=self.options.max_new_tokens,
        )  # fmt: skip

    # ------------------------------------------------------------ the floor

    def floor(self) -> dict[str, float]:
        """What one step must read, at the rate at which this device copies."""
        stack, cache = self.verifier.stack, self.verifier.new_cache(1, 1)
        model = self.verifier.model.model.language_model  # type: ignore[attr-defined]
        weights = sum(w.nbytes for w in [*model.layers.parameters(), *model.norm.parameters()])
        weights += self.verifier.lm_head.weight.nbytes
        kv = cache.num_bytes * self.middle("verifier")
        # As much as a step reads, so that what fits a cache is as near to both.
        source = torch.ones(min(weights + kv, MAX_COPY_BYTES) // 4, device=stack.device)
        target = torch.empty_like(source)
        times = interleaved({"copy": lambda: target.copy_(source)}, self.device, 30)["copy"]
        rate = 2 * source.nbytes / statistics.median(times)
        return {
            "weight_bytes": weights,
            "kv_bytes": kv,
            "copy_gb_per_s": rate / 1e6,
            "floor_ms": (weights + kv) / rate,
        }

    def overhead(self, repeats: int = 30) -> dict[str, float]:
        """Of a step's time, what is not spent in operators: Python, launches, waits."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        work = self.verify("verifier", 1)
        on_gpu = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        work()
        with profile(activities=kinds) as seen:
            times = interleaved({"step": work}, self.device, repeats, 0)["step"]
        # A GPU's time is the kernels'; the operators that launched them are listed with it again.
        where = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [event for event in seen.key_averages() if event.device_type == where]
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        busy_ms = sum(getattr(event, name) for event in events) / 1e3 / repeats
        step_ms = statistics.mean(times)
        return {
            "step_ms": step_ms,
            "operators_ms": busy_ms,
            "num_operators": sum(event.count for event in events) / repeats,
            "share": max(0.0, 1 - busy_ms / step_ms),
        }


def drafter_prefill_ms(timeline: Sequence[Span]) -> float:
    (span,) = (span for span in timeline if (span.lane, span.what) == ("drafter", "prefill"))
    return span.end_ms - span.start_ms


def clips(count: int, noise: bool) -> list[Media]:
    """Synthetic scenes, or noise of a camera's size: time does not depend on what is seen."""
    if noise:
        draw = np.random.default_rng(0).integers
        return [
            Media(
                list(draw(0, 256, (5, 480, 640, 3), dtype=np.uint8)),
                draw(0, 256, (8, 480, 640, 3), dtype=np.uint8),
            )
            for _ in range(count)
        ]
    from xsd.scenes.synthetic import sample_facts, scene_tensors

    scenes = [scene_tensors(sample_facts(np.random.default_rng(s)), s) for s in range(count)]
    return [Media(events, frames) for frames, events in scenes]


# ---------------------------------------------------------------- what is printed


def spread(times: Sequence[float]) -> str:
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return f"{middle:9.3f}  ({low:.3f} to {high:.3f})"


def show_passes(times: Times, floor: dict[str, float]) -> None:
    print("\nPasses, ms: median (quartiles)")
    t = statistics.median(times["V(1)"])
    for name, found in times.items():
        if not name.startswith("V(") or int(name[2:-1]) in (
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
            9,
            16,
            23,
            32,
            64,
        ):
            ratio = f"  V/t {statistics.median(found) / t:.2f}" if name.startswith("V(") else ""
            print(f"  {name:<18}{spread(found)}{ratio}")
    print(
        f"Floor of a step: {floor['floor_ms']:.3f} ms = {floor['weight_bytes'] / 1e6:.1f} MB of "
        f"weights + {floor['kv_bytes'] / 1e6:.2f} MB of KV at {floor['copy_gb_per_s']:.1f} GB/s "
        f"(copy, read + written); V(1) is {t / floor['floor_ms']:.1f} times that"
    )


def show_peer(found: dict[str, Any]) -> dict[str, float]:
    print("\nPlain decoding beside transformers' generate, ms an answer, processor included")
    ratios: dict[str, float] = {}
    if "times" in found:
        pooled: dict[str, float] = {}
        by_sample: dict[str, list[float]] = {}
        for times in found["times"].values():
            middle = {name: statistics.median(values) for name, values in times.items()}
            for name, ms in middle.items():
                pooled[name] = pooled.get(name, 0.0) + ms
                by_sample.setdefault(name, []).append(ms / middle["ours"])
        count = len(found["times"])
        for name, total in pooled.items():
            if name.endswith("first"):
                continue
            ratios[name] = total / pooled["ours"]
            same = f", same tokens {found['same'][name]}/{count}" if name in found["same"] else ""
            print(
                f"  {name:<38}{total / count:9.2f}  {ratios[name]:.2f} times ours "
                f"(samples {min(by_sample[name]):.2f} to {max(by_sample[name]):.2f}){same}"
            )
        steps = sum(found["num_tokens"]) - count
        for name in ("ours", "generate"):
            if f"{name}, first" in pooled:
                step = (pooled[name] - pooled[f"{name}, first"]) / max(1, steps)
                first = pooled[f"{name}, first"] / count
                print(f"  {name}: first token after {first:.2f}, then {step:.3f} a token")
                ratios[f"{name}, ms a token"] = step
        if "generate" in ratios:
            bar = "reached" if ratios["generate"] >= 1.5 else "NOT reached"
            print(f"  bar: at least 1.5 times as fast as generate: {bar}")
    for name, why in found["refused"].items():
        print(f"  {name}: not run ({why})")
    return ratios


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for field in dataclasses.fields(PairConfig):
        if field.name != "num_event_images":
            parser.add_argument(f"--{field.name}", default=field.default)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--num_samples", type=int, default=8, help="clips, a question each")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of every measurement")
    parser.add_argument("--formula_repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of this process, on a CPU")
    parser.add_argument("--noise", action="store_true", help="noise in place of rendered scenes")
    parser.add_argument("--adapter", type=Path, help="folder of an E1; else random weights")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="some of the default")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    chosen = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in chosen if name not in MEASUREMENTS]:
        raise XsdError(f"--only {options.only}: {unknown[0]!r} is none of {','.join(MEASUREMENTS)}")
    torch.set_num_threads(options.threads)
    names = {field.name for field in dataclasses.fields(PairConfig)}
    config = PairConfig(**{k: v for k, v in vars(options).items() if k in names})
    pair = load_pair(config)
    options.noise = options.noise or pair.verifier.width > 1024
    bench = Bench(pair, config, options)
    import transformers

    what = {
        "pair": f"{config.pair}, {pair.quant}, weights {config.weights}",
        "device": str(bench.device),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "prompt_rows": {role: rows.shape[1] for role, rows in bench.prompts.items()},
    }
    numbers: dict[str, Any] = {**what, "options": {k: str(v) for k, v in vars(options).items()}}
    print(*what.values(), sep="; ")
    if "passes" in chosen:
        numbers["floor"], numbers["passes_ms"] = bench.floor(), bench.passes()
        show_passes(numbers["passes_ms"], numbers["floor"])
    if "breakdown" in chosen:
        numbers["breakdown"] = parts.measure(bench, options.repeats)
        parts.show(numbers["breakdown"])
    if "overhead" in chosen:
        numbers["overhead"] = told = bench.overhead()
        print(
            f"Outside operators (Python, launches): {told['share']:.0%} of a step under the "
            f"profiler ({told['num_operators']:.0f} operators, {told['operators_ms']:.2f} of "
            f"{told['step_ms']:.2f} ms)"
        )
    if "peer" in chosen:
        numbers["peer"] = bench.against_peer()
        numbers["peer_ratios"] = show_peer(numbers["peer"])
    if "contention" in chosen:
        numbers["kappa"] = kappa = bench.contention()
        told_kappa = ", ".join(f"{role} {value:.2f}" for role, value in kappa.items())
        print(f"\nkappa (prefill while both run over prefill alone): {told_kappa}")
    if "formula" in chosen:
        numbers["formula"] = formula.measure(bench, options.formula_repeats)
        numbers["formula_worst"] = formula.show(numbers["formula"])
        numbers["formula_worst_alone"] = formula.worst(numbers["formula"]["points"], "alone")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except XsdError as error:
        print(f"engine.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
