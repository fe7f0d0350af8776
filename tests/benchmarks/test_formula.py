"""The formula's table on a clock that is made up: exact where costs are what it says they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import formula
from xsd.decoding.decoded import Decoded
from xsd.types import Strategy

ANSWER = [*range(10, 34)]
PREFILL_MS, STEP_MS, START_MS, CYCLE_MS = 3.0, 1.0, 0.4, 0.25


def pass_ms(num_rows: int) -> float:
    return 0.8 + 0.1 * num_rows


class Machine:
    """An engine whose answers take what ``pass_ms`` and the constants say; ``mixed_ms`` more for a
    cycle of which a part holds, which answers that hold nowhere or everywhere do not have."""

    def __init__(self, mixed_ms: float = 0.0) -> None:
        self.mixed_ms = mixed_ms

    def plain(self, media: object, question: str) -> Decoded:
        total_ms = PREFILL_MS + STEP_MS * (len(ANSWER) - 1)
        return Decoded(list(ANSWER), PREFILL_MS, total_ms)

    def speculate(self, media: object, question: str, party: Any, gamma: int) -> Decoded:
        said, decode_ms, drafted, accepted = 1, START_MS, [], []
        while said < len(ANSWER):
            depth = min(gamma, len(ANSWER) - said - 1)
            if depth == 0:
                said, decode_ms = said + 1, decode_ms + STEP_MS
                continue
            tokens = party.propose(ANSWER[:said], torch.zeros(1, 1), depth).tokens
            pairs = zip(tokens, ANSWER[said:], strict=False)
            held = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
            decode_ms += pass_ms(depth + 1) + CYCLE_MS + self.mixed_ms * (0 < held < depth)
            drafted.append(depth)
            accepted.append(held)
            said += held + 1
        answer = Decoded(list(ANSWER), PREFILL_MS, PREFILL_MS + decode_ms)
        answer.cycle_drafted, answer.cycle_accepted = drafted, accepted
        return answer


def bench_on(machine: Machine) -> Any:
    def party(strategy: Strategy, head: Any) -> Any:
        return head

    def verify(role: str, num_rows: int) -> Callable[[], object]:
        return lambda: None

    return SimpleNamespace(
        verifier=SimpleNamespace(vocab_size=1000),
        engine=machine,
        device=torch.device("cpu"),
        asked=[(None, "what?"), (None, "where?")],
        verify=verify,
        party=party,
    )


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(tasks: Mapping[str, object], *_: Any, **__: Any) -> dict[str, list[float]]:
        return {name: [pass_ms(int(name))] for name in tasks}

    monkeypatch.setattr(formula, "interleaved", timed)


def test_the_formula_is_exact_where_costs_are_what_it_takes_them_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = formula.measure(bench_on(Machine()), repeats=2)
    for cost in found["costs"]:
        assert cost["step_ms"] == pytest.approx(STEP_MS)
        assert cost["pass_ms"] == pytest.approx(pass_ms(int(cost["gamma"]) + 1))
        assert cost["start_ms"] == pytest.approx(START_MS)
        assert cost["cycle_ms"] == pytest.approx(CYCLE_MS)
    assert len(found["points"]) == len(formula.ALPHAS) * len(formula.GAMMAS)
    for point in found["points"]:
        assert point["measured"] == pytest.approx(point["formula"])
    assert formula.show(found) < 1e-9
    assert "bar: within 10%: yes" in capsys.readouterr().out


def test_without_what_is_fitted_a_constant_error_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """b and c take it up; passes and steps measured alone do not."""
    found = formula.measure(bench_on(Machine()), repeats=1)
    num_said = len(ANSWER) - 1
    for point in found["points"]:
        calls = 2 * num_said / point["tau"]  # of both answers
        beside_ms = 2 * START_MS + calls * CYCLE_MS
        spent_ms = 2 * num_said * STEP_MS / point["measured"]
        # The last of an answer's calls may be a plain step, which has no c.
        assert point["measured"] < point["alone"]
        told_ms = spent_ms - 2 * num_said * STEP_MS / point["alone"]
        assert beside_ms - 2 * CYCLE_MS - 1e-9 <= told_ms <= beside_ms + 1e-9
    assert formula.show(found) < 1e-9 < formula.BAR < formula.worst(found["points"], "alone")
    out = capsys.readouterr().out
    assert "nothing fitted" in out and out.count("differences") == 2


def test_a_cost_that_it_does_not_know_shows_as_a_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = formula.measure(bench_on(Machine(mixed_ms=0.5)), repeats=1)
    assert formula.show(found) > formula.BAR
    assert "bar: within 10%: NO" in capsys.readouterr().out
