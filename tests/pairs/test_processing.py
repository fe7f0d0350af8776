"""Pictures and prompts against the libraries' own way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import VideoLlavaImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.pairs.tokenizers import llama_like
from xsd.errors import XsdError
from xsd.pairs.processing import ImageProcessing, prompt_around, prompt_split

SIDE = st.integers(3, 90)


@given(edge=st.integers(5, 40), crop=st.tuples(SIDE, SIDE), size=st.tuples(SIDE, SIDE))
@settings(deadline=None, max_examples=60)
def test_pixels_are_bit_equal_to_transformers(
    edge: int, crop: tuple[int, int], size: tuple[int, int]
) -> None:
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    library = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop[0], "width": crop[1]}
    )
    # The layout is given, since a side of 3 reads as channels.
    expected = library([image], return_tensors="pt", input_data_format="channels_last")
    actual = ImageProcessing(edge, crop)([image])
    assert torch.equal(actual, expected["pixel_values"])


def test_images_of_several_sizes_make_one_batch() -> None:
    images = [np.full((height, 30, 3), 7, np.uint8) for height in (20, 30, 50)]
    assert ImageProcessing.square(16)(images).shape == (3, 3, 16, 16)


def test_configuration_survives_the_disk(tmp_path: Path) -> None:
    processing = ImageProcessing(32, (28, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1 / 200, 2)
    processing.save(tmp_path)
    assert ImageProcessing.load(tmp_path) == processing
    library = CLIPImageProcessorPil.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = library([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(processing([image]), expected)


@given(size=st.tuples(st.integers(20, 90), st.integers(20, 90)))
@settings(deadline=None, max_examples=15)
def test_frames_are_bit_equal_to_video_llavas_own_processor(size: tuple[int, int]) -> None:
    frames = np.random.default_rng(sum(size)).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    library = VideoLlavaImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    expected = library(
        list(frames),
        return_tensors="pt",
        input_data_format="channels_last",
        return_legacy_image_output=False,
    )
    assert torch.equal(ImageProcessing.square(28)(frames), expected["pixel_values"])


def test_transformers_5_keeps_processors_in_one_file(tmp_path: Path) -> None:
    processing = ImageProcessing.square(20)
    processing.save(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    assert ImageProcessing.load(tmp_path) == processing


def test_sizes_of_old_files_are_plain_numbers(tmp_path: Path) -> None:
    config = {"size": 20, "crop_size": 18, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    loaded = ImageProcessing.load(tmp_path)
    assert (loaded.shortest_edge, loaded.crop) == (20, (18, 18))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "do_normalize is off"),
        ({"size": {"height": 20, "width": 20}}, "not a CLIP image processor"),
        ({"image_mean": [0, 0]}, "not a CLIP image processor"),
        ({"image_std": None}, "not a CLIP image processor"),
    ],
)
def test_other_processors_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = {"size": 20, "crop_size": 18, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | change))
    with pytest.raises(XsdError, match=message):
        ImageProcessing.load(tmp_path)


def test_prompt_sides_equal_llavas_splitting() -> None:
    tokenizer = llama_like()
    text = "Be nice. USER: <ev_start><event><ev_end>\nWhat moves? ASSISTANT:"
    chunks = [tokenizer(chunk).input_ids for chunk in text.split("<event>")]
    prompt = prompt_around(tokenizer, *text.split("<event>"))
    assert list(prompt.before) == chunks[0]
    assert list(prompt.after) == chunks[1][1:]
    assert [*prompt.before, *prompt.after].count(tokenizer.bos_token_id) == 1


def test_prompt_with_a_placeholder_token_equals_the_tokenizers_own() -> None:
    tokenizer = llama_like("<video>")
    video = tokenizer.convert_tokens_to_ids("<video>")
    text = "USER: <video>\nWhat moves? ASSISTANT:"
    prompt = prompt_split(tokenizer, text, video)
    assert [*prompt.before, video, *prompt.after] == tokenizer(text).input_ids


@pytest.mark.parametrize("text", ["USER: nothing", "<video> and <video>"])
def test_a_prompt_has_one_placeholder(text: str) -> None:
    tokenizer = llama_like("<video>")
    with pytest.raises(XsdError, match="visual placeholders, 1 expected"):
        prompt_split(tokenizer, text, tokenizer.convert_tokens_to_ids("<video>"))


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (90, 120), (50, 70), (200, 64), (20, 33)])
def test_compiled_resizing_and_pillows_are_bit_equal(size: tuple[int, int]) -> None:
    processing = ImageProcessing(48, (48, 40))
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    by_pillow = np.empty((1, 3, 48, 40), np.float32)
    processing._by_pillow(image, by_pillow[0])
    assert np.array_equal(processing([image]), by_pillow)
    assert np.array_equal(processing([np.asfortranarray(image)]), by_pillow)


def test_square_frames_are_resized_by_a_kernel() -> None:
    assert ImageProcessing.square(64)._taps(96, 96) is not None
