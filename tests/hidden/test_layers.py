"""Further layers of the verifier, kept beside its last states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xsd.errors import XsdError
from xsd.hidden.config import ExtractConfig
from xsd.hidden.extract import extract, header
from xsd.hidden.media import read_media
from xsd.hidden.plan import plan_batches
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.pairs.video_llava import VideoLlavaDecoder
from xsd.types import Scene

CONFIG = ExtractConfig(
    max_new_tokens=8, max_questions=2, batch_clips=2, dtype="fp32", verifier_layers="1,-1"
)


def test_layers_are_the_models_own_at_the_answers_positions(
    pair: ModelPair, scenes: list[Scene], tmp_path: Path
) -> None:
    batches = plan_batches(scenes, "train", CONFIG, 2)
    top = header(pair, batches, "train", CONFIG, "data")
    assert top.config["verifier_layers"] == [1, 2]
    with HiddenWriter.open(tmp_path / "layers", top, batches) as writer:
        for number, extracted in enumerate(extract(pair, batches, CONFIG)):
            writer.add(number, extracted)
    store = HiddenStore.open(tmp_path / "layers")
    verifier = pair.verifier
    assert isinstance(verifier, VideoLlavaDecoder) and verifier.stack.tap is None
    norm = verifier.model.model.language_model.norm
    for question in batches[0].samples[:3]:
        sample = store.sample(question.key)
        media = read_media(question.scene, 5, 8)
        prompt = verifier.prompt_embeddings(media, question.question)
        fed = torch.cat([prompt, verifier.embed(sample.verifier_ids[None, :-1])], dim=1)
        with torch.inference_mode():
            shown = verifier.model.model.language_model(
                inputs_embeds=fed, output_hidden_states=True
            ).hidden_states
            assert sample.verifier_layers is not None
            assert sample.verifier_layers.shape[1] == 2
            first, last = sample.verifier_layers.unbind(1)
            expected = shown[1][0, prompt.shape[1] - 1 :]
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
            # Above the last layer there is only the norm.
            torch.testing.assert_close(norm(last), sample.verifier_hidden, rtol=1e-4, atol=1e-4)


def test_the_default_keeps_none(pair: ModelPair, scenes: list[Scene]) -> None:
    config = replace(CONFIG, verifier_layers=None)
    batches = plan_batches(scenes, "test", config, 2)
    assert "verifier_layers" not in header(pair, batches, "test", config, "data").config
    [extracted] = extract(pair, batches, config)
    assert all(sample.verifier_layers is None for sample in extracted.samples)


@pytest.mark.parametrize("layers", ["3", "0", "-3", "two", "1,,2"])
def test_layers_that_are_not_there(layers: str) -> None:
    with pytest.raises(XsdError, match=f"verifier_layers={layers}"):
        replace(CONFIG, verifier_layers=layers).layer_numbers(2)


def test_what_cannot_keep_them(scenes: list[Scene]) -> None:
    with pytest.raises(XsdError, match="the pt format has no place"):
        replace(CONFIG, chunk_format="pt")
    pair = load_pair(PairConfig("tests.pairs.third_pair"))
    with pytest.raises(XsdError, match="does not show its layers"):
        list(extract(pair, plan_batches(scenes, "test", CONFIG, 2), CONFIG))
