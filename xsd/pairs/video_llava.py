"""Video-LLaVA: video frames and a question in, text out. The verifier of both pairs.

The model is transformers'; this is its place in a pair: prompt, frames, and a visual path that
runs no layer whose output nobody reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from xsd.errors import XsdError
from xsd.pairs.base import Media, Prompt
from xsd.pairs.capture import Again
from xsd.pairs.checkpoint import Placement, load_config, load_weights, staged
from xsd.pairs.llama import LlamaDecoder
from xsd.pairs.processing import ImageProcessing, prompt_split
from xsd.pairs.vision import CompiledProjector, Features, Projection, clip_features, features_of


def load(
    folder: Path, placement: Placement | None = None
) -> tuple[VideoLlavaForConditionalGeneration, ImageProcessing]:
    """A checkpoint in transformers' layout, of any release, and its image processor.

    Args:
        placement: None: on the CPU, in the checkpoint's precision.

    Raises:
        XsdError: a file is missing or unreadable, or the tensors are not exactly the model's.
    """
    config, processing = read_config(folder)
    model_class = VideoLlavaForConditionalGeneration
    return load_weights(model_class, config, folder, placement or Placement()), processing


def read_config(folder: Path) -> tuple[VideoLlavaConfig, ImageProcessing]:
    """The configuration of a checkpoint; weights are not looked at."""
    config = load_config(VideoLlavaConfig, folder)
    layer, num_layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not (isinstance(layer, int) and -num_layers <= layer + 1 <= num_layers + 1):
        raise XsdError(f"{folder / 'config.json'}: vision_feature_layer {layer} is not one layer")
    return config, ImageProcessing.load(folder)


def published_config() -> tuple[VideoLlavaConfig, ImageProcessing]:
    """Of Video-LLaVA-7B-hf."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        video_token_index=32001,
        vision_feature_layer=-2,
    )
    return config, ImageProcessing.square(224)


def save(
    model: VideoLlavaForConditionalGeneration, processing: ImageProcessing, folder: Path
) -> None:
    with staged(folder) as staging:
        model.save_pretrained(staging)
        processing.save(staging)


def visual_tokens(
    model: VideoLlavaForConditionalGeneration,
    pixels: Float[Tensor, "*batch N 3 H W"],
    features: Features | None = None,
    project: Projection | None = None,
) -> Float[Tensor, "*batch visual D"]:
    """Frames to the projected tokens (CLS among them), frame after frame.

    Equal to ``get_video_features``, without the tower's layers above the one that is read.

    Args:
        features: of the tower; None: its modules'.
        project: features to embeddings; None: the model's module.
    """
    parts, layer = model.model, model.config.vision_feature_layer
    features = features or partial(clip_features, parts.video_tower, layer=layer)
    project = project or parts.multi_modal_projector
    projected = project(features(pixels.flatten(0, -4).to(model.dtype)))
    return projected.reshape(*pixels.shape[:-4], -1, projected.shape[-1])


VideoLlava = VideoLlavaForConditionalGeneration


class VideoLlavaDecoder(LlamaDecoder):
    """Video-LLaVA as a half of a pair. Takes the model over: its projections are fused."""

    def __init__(
        self,
        model: VideoLlavaForConditionalGeneration,
        tokenizer: Any,
        processing: ImageProcessing,
    ) -> None:
        super().__init__(
            model.model.language_model, model.lm_head, tokenizer, model.generation_config
        )
        self.model = model
        self.processing = processing
        layer = model.config.vision_feature_layer
        self.features = features_of(model.model.video_tower, layer, self.crew)
        project, kind = model.model.multi_modal_projector, model.config.projector_hidden_act
        maps = project.linear_1, kind, project.linear_2
        if CompiledProjector.takes(*maps):
            project = CompiledProjector(*maps, self.crew)
        self._visual = Again(partial(visual_tokens, model, features=self.features, project=project))

    def prompt(self, question: str) -> Prompt:
        text = f"USER: <video>\n{question} ASSISTANT:"
        return prompt_split(self.tokenizer, text, self.model.config.video_token_index)

    def pixels(self, media: Media) -> Float[Tensor, "N 3 H W"]:
        return self.processing(media.frames, self.stack.device, self.crew)

    @torch.inference_mode()
    def visual_tokens(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "visual D"]:
        return self._visual(pixels.to(self.stack.device))
