"""A pair of random weights, small enough to answer in milliseconds, and scenes to ask it about."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import VideoLlavaForConditionalGeneration

from tests.pairs import toy
from tests.pairs.tokenizers import llama_like
from xsd.files import write_json
from xsd.pairs import eventgpt, video_llava
from xsd.pairs.base import ModelPair
from xsd.pairs.config import PairConfig
from xsd.pairs.eventgpt import EventGPT, EventGPTDecoder
from xsd.pairs.processing import ImageProcessing
from xsd.pairs.video_llava import VideoLlavaDecoder
from xsd.scenes.dataset import INDEX_NAME
from xsd.scenes.events import Events, event_images, save_events
from xsd.scenes.video import write_mp4

PAIR = "eventgpt-video-llava"
D_DRAFTER, D_VERIFIER = 24, 32
TOKENIZER = llama_like("<image>", "<video>")
STOPS = list(range(60, 70))
"""Several ids end an answer, so that random answers differ in length."""


@cache
def models() -> tuple[EventGPT, VideoLlavaForConditionalGeneration]:
    torch.manual_seed(0)
    shared = {"vocab_size": len(TOKENIZER), "eos_token_id": STOPS, "max_position_embeddings": 512}
    drafter = EventGPT(toy.drafter_config(D_DRAFTER, **shared))
    video = TOKENIZER.convert_tokens_to_ids("<video>")
    verifier = VideoLlavaForConditionalGeneration(toy.verifier_config(D_VERIFIER, video, **shared))
    for model in (drafter, verifier):
        model.generation_config.eos_token_id = STOPS
    return drafter.eval(), verifier.eval()


@cache
def pair() -> ModelPair:
    drafter, verifier = models()
    processing = ImageProcessing.square(toy.IMAGE)
    return ModelPair(
        name="miniature",
        drafter=EventGPTDecoder(drafter, TOKENIZER, processing),
        verifier=VideoLlavaDecoder(verifier, TOKENIZER, processing),
        num_event_images=5,
        num_frames=8,
        quant="fp32",
        provenance={"drafter": "random", "verifier": "random"},
    )


def save_pair(folder: Path) -> PairConfig:
    """Write both checkpoints as releases are laid out."""
    drafter, verifier = models()
    processing = ImageProcessing.square(toy.IMAGE)
    eventgpt.save(drafter, processing, folder / "drafter")
    video_llava.save(verifier, processing, folder / "verifier")
    for role in ("drafter", "verifier"):
        TOKENIZER.save_pretrained(folder / role)
    return PairConfig(
        pair=PAIR,
        drafter=str(folder / "drafter"),
        verifier=str(folder / "verifier"),
        quant="fp32",
        device="cpu",
    )


def save_scenes(folder: Path, num_train: int = 4, num_val: int = 2, num_test: int = 2) -> Path:
    """Random clips in the data set's layout, two a recording."""
    random = np.random.default_rng(0)
    entries = []
    for split, count in (("train", num_train), ("val", num_val), ("test", num_test)):
        for number in range(count):
            recording, clip = f"{split}_{number // 2:04d}", f"{number % 2:06d}"
            entries.append(_save_clip(folder, split, recording, clip, random))
    write_json(folder / INDEX_NAME, entries)
    return folder


def _save_clip(
    folder: Path, split: str, recording: str, clip: str, random: np.random.Generator
) -> dict[str, object]:
    x, y = random.integers(0, 16, (2, 200)).astype(np.uint16)
    t, p = np.sort(random.integers(0, 10**6, 200)), random.integers(0, 2, 200).astype(np.uint8)
    events = Events(x, y, t, p)
    entry = {
        "id": f"{recording}/{clip}",
        "split": split,
        "event_data": f"event_npy/{recording}/{clip}.npy",
        "mp4_data": f"mp4/{recording}/{clip}.mp4",
        "event_image": [f"event_image/{recording}/{clip}_{k}.png" for k in range(5)],
    }
    save_events(folder / entry["event_data"], events)
    write_mp4(folder / entry["mp4_data"], random.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    for name, image in zip(entry["event_image"], event_images(events, 5), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return entry
