"""``xsd generate``: one question about one scene, answered before your eyes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xsd.cli import main
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.errors import XsdError
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from xsd.bench import Bench, BenchItem
    from xsd.types import Sample, Scene, Strategy, Trace

HELP = "answer one question about a scene, accepted drafts marked, and time it against plain"
PLAIN = "plain"


@dataclass(frozen=True)
class Config(DecodingConfig, PairConfig):
    """Options of one answer."""

    scene: str = "0"
    """Clip: its key (recording/000012), or its index in the split."""
    question: str = "0"
    """One of the data set's ten by its index, or any text."""
    strategy: str = "E1_decode"
    """A config of the benchmark: E1_decode, L4+VL, X1+E3, drafter+VL, ...; or plain."""
    adapter: str | None = None
    """Path, runs:/ or models:/ URI; for two adapters L4=...,E3=...; null: the champions."""
    dataset_dir: str | None = None
    """Scenes: folder or runs:/ URI; null: the newest scenes run of the pair."""
    data: str | None = None
    """Extraction whose training answers some controls need; null: the newest."""
    split: Literal["train", "val", "test"] = "test"
    """Split that --scene counts in."""
    repeats: int = 5
    """Times that the answer is decoded both ways, interleaved, for the summary; its median."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise XsdError(f"repeats={self.repeats}: must be at least 1")


def run(config: Config) -> None:
    from xsd.bench import Bench, load_items
    from xsd.decoding.controls import commonest_answers
    from xsd.decoding.strategies import parse_all
    from xsd.pairs.catalog import find_pair, load_pair

    find_pair(config.pair)
    name = BASELINE if config.strategy == PLAIN else config.strategy
    # The baseline leads; asked for alone it is there once.
    strategies = parse_all(name, config.gamma)
    strategy = strategies[-1]
    if len(strategies) > 2:
        raise XsdError(f"--strategy {name}: one answer takes one config")
    if strategy.shuffled_events:
        raise XsdError(f"--strategy {name}: there is no other scene here; leave out @...")
    adapters = _adapters(strategy, config)
    sample = _sample(config)
    answers = _answers(strategy, config)
    pair = load_pair(config)
    items = load_items([sample], pair.num_event_images, pair.num_frames)
    with ExitStack() as stack:
        bench = Bench(
            stack, pair, config, items, strategies, adapters, commonest_answers(answers), config,
            answers,
        )  # fmt: skip
        if config.strict:
            print(f"strict: every pass of decoding has {bench.strict_rows} rows")
        bench.choose_cores()
        bench.measure_costs()
        print(f"{sample.scene.key} ({sample.scene.split}): {sample.question}")
        _show(bench, items[0], strategy, config)
        traces = _timed(bench, items[0], config.repeats)
        print(summary(traces, strategy.name, is_drawn=config.temperature > 0))


def _show(bench: Bench, item: BenchItem, strategy: Strategy, config: Config) -> None:
    """Decode once, writing every token when it is said."""
    from xsd.cli.marked import MarkedText, Watched
    from xsd.decoding.speculator import LocalSpeculator
    from xsd.decoding.tables import VerifierTables

    verifier = bench.pair.verifier
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    write = partial(print, end="", flush=True)
    text = MarkedText(write, verifier.decode_text, colour=colour)
    legends = [text.legend("gap", "drafted while it was read")] if strategy.gap else []
    legends += [text.legend("head", "drafted by the head")] if strategy.head else []
    print(f"{config.strategy}: {', '.join(legends) or 'no drafts'}")
    for each in bench.strategies:
        bench.decode(item, each)
    party = bench.speculators[strategy.name] or LocalSpeculator(
        strategy, bench.pair.drafter, VerifierTables.of(verifier), {}, {},
        max_new_tokens=config.max_new_tokens, max_prompt=0, max_gap_drafts=0,
    )  # fmt: skip
    watched = Watched(party, bench.policies[strategy.name], text, config.max_new_tokens)
    # Asked for one draft at least: that is when it shows what was said.
    gamma = max(1, strategy.gamma)
    question = item.sample.question
    decoded = bench.engine.speculate(item.media, question, watched, gamma, watched.policy)
    watched.show(decoded.token_ids)
    text.close()
    drafted = decoded.gap_drafted + sum(decoded.cycle_drafted)
    accepted = decoded.gap_accepted + sum(decoded.cycle_accepted)
    told = f"{len(decoded.token_ids)} tokens"
    if strategy.gap or strategy.head:
        told += f", {accepted} of {drafted} drafts accepted"
    print(told)


def _timed(bench: Bench, item: BenchItem, repeats: int) -> list[Trace]:
    """Both ways in turn, with nothing written meanwhile."""
    from xsd.bench import Failure

    traces = []
    for repeat in range(repeats):
        for record in bench.sample(item, repeat):
            if isinstance(record, Failure):
                raise XsdError(f"{record.strategy} failed: {record.reason}")
            traces.append(record)
    return traces


def summary(traces: Sequence[Trace], strategy: str, *, is_drawn: bool = False) -> str:
    """One line: what answers took when nothing was written meanwhile, and whether they are what
    plain decoding says."""
    from xsd import speedup

    rows = speedup.per_sample(traces)
    row = rows[rows["strategy"] == strategy].iloc[0]
    own = [trace for trace in traces if trace.strategy == strategy]
    ms, plain_ms = row["total_ms"], row["baseline_total_ms"]
    told = [f"median of {len(own)}: {ms:.1f} ms"]
    if strategy == BASELINE:
        return told[0]
    told[0] += f" against {plain_ms:.1f} ms plain ({plain_ms / ms:.2f}x)"
    num_drafting = sum(bool(trace.gap_drafted or trace.cycle_drafted) for trace in own)
    told.append(f"drafts in {num_drafting} of {len(own)}")
    if is_drawn:
        return ", ".join([*told, "drawn from plain decoding's distribution"])
    same = not row["differs"] or row["excused"]
    return ", ".join([*told, f"lossless {'yes' if same else 'NO'}"])


def _sample(config: Config) -> Sample:
    from xsd.scenes.questions import QUESTIONS
    from xsd.types import Sample

    scene, question = _scene(config), config.question.strip()
    if not question:
        raise XsdError("--question: it is empty; give an index or a text")
    if not question.removeprefix("-").isdecimal():
        # The key of a sample counts questions; those of one's own come before the first.
        return Sample(scene, -1, question)
    if not 0 <= int(question) < len(QUESTIONS):
        raise XsdError(f"--question {question}: there are {len(QUESTIONS)}, counted from 0")
    return Sample(scene, int(question), QUESTIONS[int(question)])


def _scene(config: Config) -> Scene:
    from xsd.commands.extract import dataset_folder
    from xsd.scenes.dsec import load_index
    from xsd.tracking import products, reuse

    if config.dataset_dir is None:
        found = reuse.newest_finished("scenes", config.pair)
        if found is None:
            raise XsdError(
                f"pair {config.pair!r} has no finished scenes run; run 'xsd scenes' or give"
                " --dataset_dir"
            )
    else:
        found = products.load(config.dataset_dir)
    folder, wanted = dataset_folder(found), config.scene
    if wanted.isdecimal():
        scenes = load_index(folder, split=config.split)
        if int(wanted) >= len(scenes):
            raise XsdError(
                f"--scene {wanted}: split {config.split!r} has {len(scenes)} clips, counted from 0"
            )
        return scenes[int(wanted)]
    scenes = load_index(folder)
    by_key = {scene.key: scene for scene in scenes}
    if wanted not in by_key:
        raise XsdError(f"--scene {wanted}: no such clip in {folder}; a key reads {scenes[0].key}")
    return by_key[wanted]


def _adapters(strategy: Strategy, config: Config) -> dict[str, Path]:
    """By name, see ``strategies.adapter_names``: those given, else the champions."""
    from xsd.decoding.strategies import adapter_names
    from xsd.tracking import products, registry

    names = adapter_names(strategy)
    given = _given(config.adapter, names)
    found = {}
    for name in names:
        level, _, mode = name.partition(":")
        key = f"{level}-free" if mode == "free" else level
        if name not in given and registry.champion(config.pair, key) is None:
            raise XsdError(
                f"pair {config.pair!r} has no champion of {name}; run 'xsd promote' or give"
                " --adapter"
            )
        uri = given.get(name, registry.champion_uri(config.pair, key))
        found[name] = products.load(uri, {"pair": config.pair}).path
    return found


def _given(text: str | None, names: Sequence[str]) -> dict[str, str]:
    """``--adapter``: one URI, or NAME=URI for each."""
    items = [item.strip() for item in (text or "").split(",") if item.strip()]
    if len(items) == len(names) == 1 and "=" not in items[0]:
        return {names[0]: items[0]}
    pairs = [item.partition("=") for item in items]
    for name, equals, uri in pairs:
        if not equals or not uri or name not in names:
            wanted = ",".join(f"{name}=URI" for name in names) if names else "no adapter"
            raise XsdError(f"--adapter {text}: this strategy takes {wanted}")
    return {name: uri for name, _, uri in pairs}


def _answers(strategy: Strategy, config: Config) -> list[tuple[str, Sequence[int]]]:
    """The training set's, for the controls that repeat them."""
    from xsd import bench
    from xsd.hidden.store import HiddenStore, find_folder
    from xsd.tracking import products, reuse

    if strategy.gap != "template" and strategy.head != "ngram":
        return []
    found = (
        reuse.newest_finished("extract", config.pair, {"has_train": "true"})
        if config.data is None
        else products.load(config.data)
    )
    if found is None:
        raise XsdError(
            f"pair {config.pair!r} has no finished extract run; run 'xsd extract' or give --data"
        )
    return list(bench.training_answers(HiddenStore.open(find_folder(found.path, "train"))))


if __name__ == "__main__":
    raise SystemExit(main(command="generate"))
