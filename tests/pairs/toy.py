"""Configurations of both halves of the real pair at toy sizes."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig

from xsd.pairs.eventgpt import EventGPTConfig

IMAGE = 16


def drafter_config(width: int, **changes: object) -> EventGPTConfig:
    text = _text(width, 1, changes)
    return EventGPTConfig(vision_config=_vision(), event_feature_adaptor=True, **text)


def verifier_config(width: int, video_token: int, **changes: object) -> VideoLlavaConfig:
    """``video_token``: id of the placeholder; the image's comes before it."""
    return VideoLlavaConfig(
        vision_config=_vision(),
        text_config=LlamaConfig(**_text(width, 2, changes)),
        image_token_index=video_token - 1,
        video_token_index=video_token,
        initializer_range=0.35,
    )


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


def _text(width: int, num_layers: int, changes: dict[str, object]) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 40,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.35,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
