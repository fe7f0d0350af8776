"""Counts are those of a plain reference in float64, answer by answer, position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.adapters.conftest import D_VERIFIER, make_adapter
from tests.test_metrics import LM_HEAD, batch, every_level, one
from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import LEVELS, Level
from xsd.counts import THRESHOLDS, TOP
from xsd.metrics import score

MARGIN = 1e-6


def double(streams: Streams) -> Streams:
    names = ("drafter", "verifier", "token", "visual")
    held = {name: getattr(streams, name).double() for name in names}
    return Streams(**held, ids=streams.ids, mask=streams.mask)


def reference(adapter: Adapter, answers: list[Streams]) -> tuple[dict[str, list[int]], int]:
    """Counts by name, and how many values lie too near a threshold to be told apart."""
    shift, near = adapter.row.shift, 0
    counts = {"accepted": [0] * len(THRESHOLDS), "consecutive": [0] * len(THRESHOLDS)}
    counts["top"] = [0] * len(TOP)
    head, model = LM_HEAD.double(), adapter.double()
    for answer in answers:
        out = model(double(answer))[0]
        target, ids = answer.verifier[0].double(), answer.ids[0]
        running = [True] * len(THRESHOLDS)
        for t in range(len(ids) - shift):
            a, b = out[t], target[t + shift]
            cosine = float(a @ b / (a.norm() * b.norm()))
            for i, threshold in enumerate(THRESHOLDS):
                near += abs(cosine - threshold) < MARGIN
                running[i] = running[i] and cosine > threshold
                counts["accepted"][i] += cosine > threshold
                counts["consecutive"][i] += running[i]
            logits: Tensor = head @ a
            said = logits[ids[t + shift]]
            others = torch.cat([logits[: ids[t + shift]], logits[ids[t + shift] + 1 :]])
            near += int((others - said).abs().min() < MARGIN)
            for i, k in enumerate(TOP):
                counts["top"][i] += int((others > said).sum()) < k
    adapter.float()
    return counts, near


@every_level
@torch.no_grad()
def test_counts_are_the_references(row: Level) -> None:
    adapter = make_adapter(row.name)
    # States near their targets, so that all thresholds matter.
    streams = batch(batch_size=5, length=24 - 7)
    answers = [one(streams, index) for index in range(5)]
    expected, near = reference(adapter, answers)
    found = score(adapter, [streams], LM_HEAD).target
    for name, values in expected.items():
        for a, b in zip(getattr(found, name), values, strict=True):
            assert abs(a - b) <= near, name
    assert near <= 1, "a reference in which everything is near a threshold shows nothing"


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.1, 0.5, 0.7, 1.0])
def test_thresholds_in_float32(noise: float) -> None:
    from tests.test_metrics import Map, score_batch

    streams = batch(batch_size=40, length=90)
    torch.manual_seed(0)
    out = streams.verifier + noise * torch.randn_like(streams.verifier)
    stub = Map(LEVELS["L4"], lambda s, n: [out[streams.mask][None]] * n)
    found = score_batch(stub, streams, LM_HEAD, 2).counts.target
    a, b = out[streams.mask].double(), streams.verifier[streams.mask].double()
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    for count, threshold in zip(found.accepted, THRESHOLDS, strict=True):
        near = int(((cosine - threshold).abs() < MARGIN).sum())
        assert abs(count - int((cosine > threshold).sum())) <= near
    assert a.shape[1] == D_VERIFIER and found.cos_sum == pytest.approx(float(cosine.sum()))
