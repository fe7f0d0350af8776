from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.adapters.conftest import D_VERIFIER, make_adapter, make_streams
from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import LEVELS
from xsd.errors import XsdError
from xsd.learning.batches import TrainBatch
from xsd.learning.config import FitConfig
from xsd.learning.fit import fit, learning_rate

LM_HEAD = torch.randn(50, D_VERIFIER, generator=torch.Generator().manual_seed(3))
CONFIG = FitConfig(num_epochs=4, learning_rate=1e-3, unroll_steps=2)


def batches(epoch: int, skip: int = 0) -> Iterator[TrainBatch]:
    streams = make_streams(batch=4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(epoch))
    for half in order.split(2)[skip:]:
        names = ("drafter", "verifier", "token", "visual", "ids", "mask")
        packed, layout = Streams(**{n: getattr(streams, n)[half] for n in names}).packed()
        yield TrainBatch(packed, layout.lengths)


def constant(adapter: Adapter) -> dict[str, float]:
    assert not adapter.training
    return {"tau_6": 1.0, "accepted_prefix_22": 1.0}


def test_learns() -> None:
    config = replace(CONFIG, num_epochs=20, early_stopping=0, learning_rate=1e-2)
    reports = list(fit(make_adapter("E1"), batches, config, constant, lm_head=LM_HEAD))
    assert reports[-1].train["loss"] < 0.7 * reports[0].train["loss"]
    assert [r.epoch for r in reports] == list(range(20))
    assert [r.step for r in reports] == list(range(2, 42, 2))


@pytest.mark.parametrize("loss", ["token", "feature"])
def test_killed_and_resumed_ends_with_the_same_weights(tmp_path: Path, loss: str) -> None:
    config = replace(CONFIG, loss=loss)
    whole, first, second = (make_adapter("E3") for _ in range(3))
    expected = list(fit(whole, batches, config, constant, lm_head=LM_HEAD))
    state = tmp_path / "run" / "state.safetensors"
    # The third epoch is trained but never taken in, as when the process is killed then.
    run = fit(first, batches, config, constant, lm_head=LM_HEAD, state=state)
    list(islice(run, 3))
    run.close()  # type: ignore[attr-defined]
    torch.rand(5)
    rest = list(fit(second, batches, config, constant, lm_head=LM_HEAD, state=state))
    assert [replace(r, seconds=0.0) for r in rest] == [
        replace(r, seconds=0.0) for r in expected[2:]
    ]
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in state.parent.iterdir()] == ["state.safetensors"]


def test_leaves_the_callers_random_numbers_alone() -> None:
    adapter = make_adapter("B1")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(fit(adapter, batches, CONFIG, constant, lm_head=LM_HEAD))
    assert torch.equal(torch.rand(3), expected)


def test_keeps_the_best_and_stops_early() -> None:
    scores = iter([1.0, 3.0, 2.0, 3.0, 9.0])

    def scorer(adapter: Adapter) -> dict[str, float]:
        return {"accepted_prefix_22": next(scores)}

    config = replace(CONFIG, num_epochs=9, early_stopping=2)
    reports = list(fit(make_adapter("L1"), batches, config, scorer, lm_head=LM_HEAD))
    assert [r.is_best for r in reports] == [True, True, False, False]


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    config, state = replace(CONFIG, num_epochs=9, early_stopping=2), tmp_path / "state"
    run = fit(make_adapter("L1"), batches, config, constant, lm_head=LM_HEAD, state=state)
    list(islice(run, 3))  # the third report is out, two epochs are on disk
    rest = fit(make_adapter("L1"), batches, config, constant, lm_head=LM_HEAD, state=state)
    assert len(list(rest)) == 1
    again = fit(make_adapter("L1"), batches, config, constant, lm_head=LM_HEAD, state=state)
    assert list(again) == []


def test_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    list(fit(make_adapter("L1"), batches, CONFIG, constant, lm_head=LM_HEAD, state=state))
    other = replace(CONFIG, learning_rate=1e-4)
    with pytest.raises(XsdError, match="another configuration"):
        next(fit(make_adapter("L1"), batches, other, constant, lm_head=LM_HEAD, state=state))
    state.write_bytes(b"nonsense")
    with pytest.raises(XsdError, match="unreadable"):
        next(fit(make_adapter("L1"), batches, CONFIG, constant, lm_head=LM_HEAD, state=state))


def test_nan_loss_is_one_line() -> None:
    def poisoned(epoch: int, skip: int) -> Iterator[TrainBatch]:
        for batch in batches(epoch, skip):
            streams = replace(batch.streams, verifier=batch.streams.verifier * torch.nan)
            yield replace(batch, streams=streams)

    with pytest.raises(XsdError, match="loss became nan in epoch 0, step 0"):
        next(fit(make_adapter("L1"), poisoned, CONFIG, constant, lm_head=LM_HEAD))


def test_empty_training_data_is_refused() -> None:
    with pytest.raises(XsdError, match="no training batches"):
        next(
            fit(make_adapter("L1"), lambda epoch, skip: iter(()), CONFIG, constant, lm_head=LM_HEAD)
        )


def test_learning_rate_warms_up_then_falls_to_eta_min() -> None:
    config = FitConfig(num_epochs=10, learning_rate=1.0, eta_min=0.1, warmup_steps=4)
    assert learning_rate(config, 0, 0) == pytest.approx(0.25)
    assert learning_rate(config, 0, 3) == pytest.approx(1.0)
    assert learning_rate(config, 5, 99) == pytest.approx(0.55)
    assert learning_rate(config, 10, 99) == pytest.approx(0.1)


def test_the_cosine_goes_over_steps_where_an_epoch_has_a_known_number() -> None:
    class Counted:
        def __len__(self) -> int:
            return 2

        def __call__(self, epoch: int, skip: int = 0) -> Iterator[TrainBatch]:
            return batches(epoch, skip)

    config = replace(CONFIG, learning_rate=1.0e-3, eta_min=0.0)
    found = [
        [
            report.learning_rate
            for report in fit(make_adapter("E1"), one, config, constant, lm_head=LM_HEAD)
        ]
        for one in (Counted(), batches)
    ]
    # The last of two steps of an epoch is half an epoch further on.
    halfway = [learning_rate(config, epoch + 0.5, 99) for epoch in range(4)]
    assert found == [
        pytest.approx(halfway),
        pytest.approx([learning_rate(config, e, 99) for e in range(4)]),
    ]


@pytest.mark.parametrize(
    "bad", [{"num_epochs": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}, {"unroll_steps": 0}]
)
def test_bad_hyperparameters_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(XsdError, match=next(iter(bad))):
        FitConfig(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_trains_in_mixed_precision(name: str) -> None:
    def losses(mixed: str) -> list[float]:
        config = replace(CONFIG, num_epochs=2, mixed_precision=mixed)
        adapter = make_adapter(name)
        reports = list(fit(adapter, batches, config, constant, lm_head=LM_HEAD))
        assert all(x.dtype == torch.float32 for x in adapter.parameters())
        return [report.train["loss"] for report in reports]

    half, full = losses("bf16"), losses("no")
    assert half == pytest.approx(full, rel=0.05) and half != full
