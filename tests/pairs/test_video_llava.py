"""Our path through Video-LLaVA against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from tests.pairs.published import old_name
from tests.pairs.tokenizers import llama_like
from xsd.errors import XsdError
from xsd.pairs import video_llava
from xsd.pairs.base import Media
from xsd.pairs.checkpoint import Placement
from xsd.pairs.processing import ImageProcessing
from xsd.pairs.video_llava import VideoLlavaDecoder

IMAGE, PATCH, WIDTH, NUM_FRAMES = 16, 8, 32, 3
NUM_VISUAL = NUM_FRAMES * ((IMAGE // PATCH) ** 2 + 1)
TOKENIZER = llama_like("<image>", "<video>")
VIDEO = TOKENIZER.convert_tokens_to_ids("<video>")
QUESTION = "What moves?"


def make(feature_layer: int = -2, kv_heads: int = 4) -> VideoLlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE,
        patch_size=PATCH,
        initializer_range=0.1,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=len(TOKENIZER),
        initializer_range=0.1,
    )
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=feature_layer,
        image_token_index=VIDEO - 1,
        video_token_index=VIDEO,
        initializer_range=0.1,
    )
    return VideoLlavaForConditionalGeneration(config).eval()


@pytest.fixture
def media() -> Media:
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 20, 24, 3), dtype=np.uint8)
    return Media([], frames)


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 1, 2, 3])
def test_visual_tokens_equal_get_video_features(layer: int) -> None:
    model = make(layer)
    pixels = torch.randn(2, NUM_FRAMES, 3, IMAGE, IMAGE)
    with torch.inference_mode():
        expected = model.model.get_video_features(pixels, return_dict=True).pooler_output
        actual = video_llava.visual_tokens(model, pixels)
    assert actual.shape == (2, NUM_VISUAL, WIDTH)
    torch.testing.assert_close(actual.flatten(0, 1), expected.flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_prefill_and_cached_decoding_equal_generate(media: Media, kv_heads: int) -> None:
    model = make(kv_heads=kv_heads)
    processing = ImageProcessing.square(IMAGE)
    num_steps = 12

    text = f"USER: <video>\n{QUESTION} ASSISTANT:".replace("<video>", "<video>" * NUM_VISUAL)
    inputs = TOKENIZER(text, return_tensors="pt")
    inputs["pixel_values_videos"] = processing(media.frames)[None]
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=num_steps,
        min_new_tokens=num_steps,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_logits=True,
        pad_token_id=0,
    )
    expected_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected_states = torch.cat([step[-1][0, -1:] for step in output.hidden_states])
    expected_prompt = output.hidden_states[0][-1]

    decoder = VideoLlavaDecoder(model, TOKENIZER, processing)
    embeds = decoder.prompt_embeddings(media, QUESTION)
    cache = decoder.new_cache(1, embeds.shape[1] + num_steps)
    hidden = decoder.forward(embeds, cache)
    torch.testing.assert_close(hidden, expected_prompt, rtol=1e-5, atol=1e-5)
    ids, states = [], []
    hidden = hidden[:, -1:]
    for step in range(num_steps):
        logits = decoder.logits(hidden)[0, 0]
        torch.testing.assert_close(logits, output.logits[step][0], rtol=1e-5, atol=1e-5)
        ids.append(int(logits.argmax()))
        states.append(hidden[0])
        hidden = decoder.forward(decoder.embed(torch.tensor([[ids[-1]]])), cache)
    assert ids == expected_ids
    torch.testing.assert_close(torch.cat(states), expected_states, rtol=1e-5, atol=1e-5)

    cache.length = embeds.shape[1]
    rows = decoder.forward(decoder.embed(torch.tensor([ids[:-1]])), cache)
    torch.testing.assert_close(rows[0], expected_states[1:], rtol=1e-5, atol=1e-5)


def test_prompt(media: Media) -> None:
    decoder = VideoLlavaDecoder(make(), TOKENIZER, ImageProcessing.square(IMAGE))
    prompt = decoder.prompt(QUESTION)
    ids = TOKENIZER(f"USER: <video>\n{QUESTION} ASSISTANT:").input_ids
    assert [*prompt.before, VIDEO, *prompt.after] == ids
    assert decoder.eos_ids == {2}
    with pytest.raises(XsdError, match="visual placeholders"):
        decoder.prompt("Is <video> a token?")


def test_save_and_load(tmp_path: Path) -> None:
    model = make()
    processing = ImageProcessing.square(IMAGE)
    video_llava.save(model, processing, tmp_path / "model")
    again, loaded = video_llava.load(tmp_path / "model")
    assert loaded == processing
    assert not again.training
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    half, _ = video_llava.load(tmp_path / "model", Placement("bf16"))
    assert half.dtype == torch.bfloat16


def test_names_of_the_published_checkpoint(tmp_path: Path) -> None:
    """The hub's file: towers under ``vision_model``, the language model at the top, old buffers."""
    model = make()
    video_llava.save(model, ImageProcessing.square(IMAGE), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {old_name(name): value for name, value in tensors.items()}
    old["video_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 5, dtype=torch.long)
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    state = video_llava.load(tmp_path)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    video_llava.save(make(), ImageProcessing.square(IMAGE), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "down_proj" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(XsdError, match=r"tensors missing: .*down_proj"):
        video_llava.load(tmp_path)


def test_a_feature_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    video_llava.save(make(), ImageProcessing.square(IMAGE), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layer in (-5, 4, [-1, -2]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": layer}))
        with pytest.raises(XsdError, match="vision_feature_layer"):
            video_llava.load(tmp_path)


def test_a_checkpoint_without_its_processor_is_refused(tmp_path: Path) -> None:
    video_llava.save(make(), ImageProcessing.square(IMAGE), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(XsdError, match=r"preprocessor_config\.json"):
        video_llava.load(tmp_path)
