from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.conftest import make_adapter, make_streams
from tests.commands.conftest import World, drawn, tags, xsd
from xsd.adapters import checkpoint
from xsd.adapters.base import Adapter
from xsd.adapters.catalog import build, configure
from xsd.adapters.config import AdapterSizes
from xsd.metrics import score_batch
from xsd.two_phase import TwoPhaseCounts, _hand_over, count_two_phase

SIZES = AdapterSizes(num_heads=4, ffn_dim=16, bottleneck_dim=8, max_positions=16)


@pytest.fixture
def checkpoints(workplace: Path) -> dict[str, Path]:
    for name in ("L4", "E3", "L5"):
        checkpoint.save(build(configure(name, 24, 32, SIZES)), workplace / name)
    return {name: workplace / name for name in ("L4", "E3", "L5")}


@pytest.mark.parametrize(
    ("matches", "prefix", "num_free", "expected"),
    [
        # draft 0 missed: decode starts from token 0 as if nothing had been drafted
        (0, [3, 4, 4, 4, 4, 4], 3, (0, 2)),
        # nothing was ready
        (3, [0, 0, 0, 0, 0, 0], 0, (0, 5)),
        # one draft was ready and held: prefill had said it, there is no pass
        (3, [0, 0, 0, 0, 0, 0], 1, (1, 5)),
        # two held, the pass adds one: three known, two calls for three tokens
        (2, [9, 9, 1, 9, 0, 0], 3, (2, 2)),
        # all held, and the answer is over
        (6, [9, 9, 9, 9, 9, 9], 9, (6, 0)),
    ],
)
def test_where_one_phase_ends_the_other_begins(
    matches: int, prefix: list[int], num_free: int, expected: tuple[int, int]
) -> None:
    length, accepted, cycles, emitted, _ = _hand_over(matches, prefix, 6, num_free, 4)
    assert (accepted, cycles) == expected
    assert length == 6 and 6 - emitted >= max(1, accepted)


def test_counts_agree_with_the_metrics_of_either_phase() -> None:
    """With nothing free, the head's tau is its own; with all free, the gap's prefix is."""
    gap, head, streams = make_adapter("L4"), make_adapter("E3"), make_streams()
    lm_head = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))

    def count(num_free: int) -> TwoPhaseCounts:
        return count_two_phase(
            gap, head, [(streams, streams)], lm_head, num_free=lambda _: num_free, gamma=4
        )

    def rates(adapter: Adapter) -> dict[str, float]:
        return score_batch(adapter, streams, lm_head, 4).counts.rates()

    assert count(0).tau == count(0).tau_alone == pytest.approx(rates(head)["tau_4"])
    accepted = count(99).accepted
    assert sum(accepted) / 3 == pytest.approx(rates(gap)["accepted_prefix_22"])
    assert count(0).lengths == tuple(streams.mask.sum(dim=1).tolist())


def test_run(
    world: World,
    checkpoints: dict[str, Path],
    runs: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--prefill_checkpoint", checkpoints["L4"], "--decode_checkpoint", checkpoints["E3"]]
    data = ["--data", world.data, "--lm_head", world.head, "--output_dir", "out"]
    xsd("two_phase", *world.pair_flags, *given, *data, "--gamma", 3)
    [run] = runs("two_phase")
    assert run.info.run_name == "two_phase L4+E3" and tags(run)["level"] == "L4+E3"
    metrics = run.data.metrics
    written = json.loads(Path("out/two_phase.json").read_text())
    for key in (
        *("phase1.accepted", "phase2.tau_3", "modelled.speedup_e2e", "modelled.num_free"),
        *("modelled.gap_only_speedup", "modelled.decode_only_speedup", "modelled.tau"),
    ):
        assert written[key] == pytest.approx(metrics[key]), key
    assert 1 <= metrics["phase2.tau_3"] <= 4
    assert drawn(Path("out/two_phase.html")) == ["stage_timeline"]
    assert "modelled speedup" in capsys.readouterr().out


def test_a_head_cannot_draft_in_the_gap(
    world: World, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prefill_checkpoint", checkpoints["L5"], "--decode_checkpoint", checkpoints["E3"]]
    data = ["--data", world.data, "--lm_head", world.head]
    xsd("two_phase", *world.pair_flags, *given, *data, expect=2)
    assert "L5 does not draft in the gap phase" in capsys.readouterr().err
