from __future__ import annotations

import pytest
import torch

from xsd.adapters.catalog import level
from xsd.adapters.collate import Answers, collate
from xsd.errors import XsdError
from xsd.hidden.sample import ClipVisual, HiddenSample

EMBEDDING = torch.randn(50, 6)
VISUALS = {"night/000003": ClipVisual("night/000003", torch.zeros(5, 6), torch.ones(5, 6))}


def sample(num_drafter: int, num_verifier: int) -> HiddenSample:
    return HiddenSample(
        key="night/000003/q1",
        drafter_hidden=torch.randn(num_drafter, 4).bfloat16(),
        verifier_hidden=torch.randn(num_verifier, 6).bfloat16(),
        drafter_ids=torch.randint(1, 50, (num_drafter,)),
        verifier_ids=torch.randint(1, 50, (num_verifier,)),
    )


def test_answers_lie_one_behind_the_other() -> None:
    short, long = sample(3, 3), sample(5, 5)
    streams = collate([short, long], level("E2"), embedding=EMBEDDING)
    assert streams.layout is not None and streams.layout.lengths == (3, 5)
    assert streams.ids.shape == (1, 8) and bool(streams.mask.all())
    assert streams.drafter is not None and streams.token is not None and streams.visual is None
    assert torch.equal(streams.drafter[0, :3], short.drafter_hidden.float())
    assert torch.equal(streams.verifier[0, 3:], long.verifier_hidden.float())
    assert torch.equal(streams.token[0, 3:], EMBEDDING[long.verifier_ids])


def test_batches_are_taken_by_number() -> None:
    samples = [sample(n, n) for n in (2, 5, 3)]
    answers = Answers(samples, level("L1"))
    streams = answers.batch([2, 0])
    assert streams.layout is not None and streams.layout.lengths == (3, 2)
    expected = torch.cat([samples[2].verifier_hidden, samples[0].verifier_hidden]).float()
    assert torch.equal(streams.verifier[0], expected)
    assert streams.ids[0].tolist() == [*samples[2].verifier_ids, *samples[0].verifier_ids]


def test_free_running_pairs_are_cut_to_the_shorter() -> None:
    streams = collate([sample(3, 7), sample(6, 4)], level("L1"))
    assert streams.layout is not None and streams.layout.lengths == (3, 4)
    assert streams.token is None


@pytest.mark.parametrize(("name", "expected"), [("X1", 0.0), ("E3", 1.0)])
def test_visual_kind_is_the_levels(name: str, expected: float) -> None:
    streams = collate([sample(3, 3)], level(name), embedding=EMBEDDING, visuals=VISUALS)
    assert streams.visual is not None and streams.visual.mean() == expected


def test_what_is_missing_is_named() -> None:
    with pytest.raises(XsdError, match="level E1 needs the verifier's embeddings"):
        collate([sample(3, 3)], level("E1"))
    with pytest.raises(XsdError, match="level X1 needs the clips' projected"):
        collate([sample(3, 3)], level("X1"))
    with pytest.raises(XsdError, match="missing for night/000003"):
        collate([sample(3, 3)], level("X1"), visuals={})
