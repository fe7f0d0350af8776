"""A shared prefix changes what is computed, not what comes out."""

from __future__ import annotations

import pytest
import torch

from xsd.errors import XsdError
from xsd.hidden.media import read_media
from xsd.hidden.prefix import share_prefix
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.generate import generate, teacher_force
from xsd.types import Scene

QUESTIONS = ["Why?", "What is this scene about?", "Describe the following scene."]
NUM_NEW = 14


@pytest.fixture(params=["drafter", "verifier"])
def decoder(request: pytest.FixtureRequest, pair: ModelPair) -> Decoder:
    return getattr(pair, request.param)


def test_answers_and_states_equal_those_of_whole_prompts(
    decoder: Decoder, scenes: list[Scene]
) -> None:
    media = [read_media(scene, 5, 8) for scene in scenes[:3]]
    prompts = [decoder.prompt_embeddings(m, q)[0] for m in media for q in QUESTIONS]
    visuals = [decoder.visual_tokens(decoder.pixels(m)) for m in media]
    shared, rests = share_prefix(decoder, visuals, QUESTIONS, NUM_NEW)
    expected = generate(decoder, prompts, NUM_NEW)
    actual = generate(shared, rests, NUM_NEW)
    assert len({len(answer.ids) for answer in expected}) > 1
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-4)
    ids = [answer.ids for answer in expected]
    for one, other in zip(
        teacher_force(shared, rests, ids), teacher_force(decoder, prompts, ids), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_padding_longer_than_the_prefix(decoder: Decoder) -> None:
    """Padding stands behind the prefix, however long it is."""
    visuals = [torch.randn(2, decoder.width)] * 2
    questions = ["?", "a much longer question than the few positions of this prefix" * 5]
    prompts = [
        decoder.embed_prompt(decoder.prompt(q), visual)[0] for visual in visuals for q in questions
    ]
    shared, rests = share_prefix(decoder, visuals, questions, NUM_NEW)
    assert len(rests[1]) - len(rests[0]) > shared.states.shape[1]
    for one, other in zip(
        generate(shared, rests, NUM_NEW), generate(decoder, prompts, NUM_NEW), strict=True
    ):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-4)


def test_too_long_a_prompt_is_refused(decoder: Decoder) -> None:
    visual = torch.randn(5, decoder.width)
    with pytest.raises(XsdError, match="positions, the model has 512; lower --max_new_tokens"):
        share_prefix(decoder, [visual], ["Why?"], 500)
