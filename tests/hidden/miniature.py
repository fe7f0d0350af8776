"""A pair of random weights, small enough to answer in milliseconds, and scenes to ask it about."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from tests.pairs.tokenizers import llama_like
from xsd.pairs import eventgpt, video_llava
from xsd.pairs.base import ModelPair
from xsd.pairs.config import PairConfig
from xsd.pairs.eventgpt import EventGPT, EventGPTConfig, EventGPTDecoder
from xsd.pairs.processing import ImageProcessing
from xsd.pairs.video_llava import VideoLlavaDecoder
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes

PAIR = "eventgpt-video-llava"
D_DRAFTER, D_VERIFIER = 24, 32
IMAGE = 16
TOKENIZER = llama_like("<image>", "<video>")


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE,
        patch_size=8,
        initializer_range=0.3,
    )


def _text(width: int, num_layers: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": 40,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(TOKENIZER),
        "max_position_embeddings": 512,
        "initializer_range": 0.35,
        "bos_token_id": 1,
        "eos_token_id": list(range(60, 70)),
    }


@cache
def models() -> tuple[EventGPT, VideoLlavaForConditionalGeneration]:
    """Several ids end an answer, so that random answers differ in length."""
    torch.manual_seed(0)
    drafter = EventGPT(
        EventGPTConfig(vision_config=_vision(), event_feature_adaptor=True, **_text(D_DRAFTER, 1))
    )
    video = TOKENIZER.convert_tokens_to_ids("<video>")
    verifier = VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            vision_config=_vision(),
            text_config=LlamaConfig(**_text(D_VERIFIER, 2)),
            image_token_index=video - 1,
            video_token_index=video,
            initializer_range=0.35,
        )
    )
    for model in (drafter, verifier):
        model.generation_config.eos_token_id = list(range(60, 70))
    return drafter.eval(), verifier.eval()


@cache
def pair() -> ModelPair:
    drafter, verifier = models()
    processing = ImageProcessing.square(IMAGE)
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
    processing = ImageProcessing.square(IMAGE)
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
    """Synthetic clips, two a recording."""
    config = ScenesConfig(
        output_dir=folder,
        num_train=num_train,
        num_val=num_val,
        num_test=num_test,
        clips_per_recording=2,
        size=32,
        num_workers=1,
    )
    for _ in make_scenes(config):
        pass
    return folder
