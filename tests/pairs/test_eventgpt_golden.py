"""EventGPT against a recording made with the published model code (random weights, float32).

``XSD_EVENTGPT_GOLDEN`` names another recording's folder; every size is read from the recording.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from xsd.pairs import eventgpt
from xsd.pairs.base import Media, Prompt
from xsd.scenes.events import event_images, load_events

GOLDEN = Path(
    os.environ.get("XSD_EVENTGPT_GOLDEN") or Path(__file__).parents[1] / "data" / "eventgpt_golden"
)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def decoder() -> eventgpt.EventGPTDecoder:
    model, processing = eventgpt.load(GOLDEN / "checkpoint")
    return eventgpt.EventGPTDecoder(model, tokenizer=None, processing=processing)


@pytest.fixture(scope="module")
def media(expected: dict[str, torch.Tensor]) -> Media:
    events = load_events(GOLDEN / "events.npy")
    images = event_images(events, len(expected["pixel_values"]))
    return Media(event_images=images, frames=np.zeros((0, 1, 1, 3), np.uint8))


@pytest.fixture(scope="module")
def prompt(expected: dict[str, torch.Tensor]) -> Prompt:
    ids = expected["input_ids"][0].tolist()
    at = ids.index(eventgpt.PLACEHOLDER_ID)
    return Prompt(tuple(ids[:at]), tuple(ids[at + 1 :]))


def test_golden_event_images(media: Media) -> None:
    recorded = sorted(GOLDEN.glob("event_*.png"), key=lambda path: int(path.stem.split("_")[1]))
    assert len(recorded) == len(media.event_images)
    for path, image in zip(recorded, media.event_images, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_golden_pixel_values(
    decoder: eventgpt.EventGPTDecoder, media: Media, expected: dict[str, torch.Tensor]
) -> None:
    torch.testing.assert_close(decoder.pixels(media), expected["pixel_values"], rtol=0, atol=0)


def test_golden_inputs_embeds(
    decoder: eventgpt.EventGPTDecoder, prompt: Prompt, expected: dict[str, torch.Tensor]
) -> None:
    visual = decoder.visual_tokens(expected["pixel_values"])
    embeds = decoder.embed_prompt(prompt, visual)
    torch.testing.assert_close(embeds, expected["inputs_embeds"], rtol=0, atol=1e-4)


def test_golden_prefill_and_greedy_decoding(
    decoder: eventgpt.EventGPTDecoder,
    media: Media,
    prompt: Prompt,
    expected: dict[str, torch.Tensor],
) -> None:
    embeds = decoder.embed_prompt(prompt, decoder.visual_tokens(decoder.pixels(media)))
    num_steps = len(expected["generated_ids"])
    cache = decoder.new_cache(1, embeds.shape[1] + num_steps)
    hidden = decoder.forward(embeds, cache)
    torch.testing.assert_close(hidden, expected["prompt_hidden"], rtol=0, atol=1e-4)
    states, rows, ids = [], [], []
    hidden = hidden[:, -1:]
    for _ in range(num_steps):
        logits = decoder.logits(hidden)
        states.append(hidden[0, 0])
        rows.append(logits[0, 0])
        ids.append(int(logits.argmax()))
        hidden = decoder.forward(decoder.embed(torch.tensor([[ids[-1]]])), cache)
    assert ids == expected["generated_ids"].tolist()
    torch.testing.assert_close(torch.stack(states), expected["generated_hidden"], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack(rows), expected["generated_logits"], rtol=0, atol=1e-4)


def test_golden_checkpoint_is_saved_under_its_published_names(tmp_path: Path) -> None:
    model, processing = eventgpt.load(GOLDEN / "checkpoint")
    eventgpt.save(model, processing, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    with safe_open(GOLDEN / "checkpoint" / "model.safetensors", "pt") as published:
        assert sorted(saved) == sorted(published.keys())
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, published.get_tensor(name), rtol=0, atol=0)
    _, again = eventgpt.load(tmp_path / "saved")
    assert again == processing
