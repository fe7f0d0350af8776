"""EventGPT: event images and a question in, text out. The drafter of both pairs.

A Llama decoder behind a CLIP tower, two projections, and a pooling that keeps time and space
apart. Tensor names, prompt and arithmetic are those of the published 7B release.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from xsd.errors import XsdError
from xsd.files import read_json, write_json
from xsd.pairs.base import Media, Prompt
from xsd.pairs.capture import Again
from xsd.pairs.checkpoint import Placement, load_config, load_weights, staged
from xsd.pairs.llama import LlamaDecoder
from xsd.pairs.processing import ImageProcessing, prompt_around
from xsd.pairs.vision import Features, clip_features, features_of

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PLACEHOLDER = "<event>"
PLACEHOLDER_ID = -200
"""How the published code marks the visual tokens' place in a row of ids."""
MAX_SEQUENCE = 2048
"""Where a multimodal prompt is cut unless the configuration says otherwise."""
PUBLISHED_TOWER = "clip-vit-large-patch14-336"
TOWER_FOLDER = "clip"
_PUBLISHED_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class EventGPTConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama configuration with a CLIP tower; without ``vision_config`` it is ViT-L/14-336."""

    model_type = "EventChat_llama"
    # The constructor is made by transformers and takes more than its signature tells.
    __no_type_check__ = True
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": CLIPVisionConfig}

    vision_config: dict[str, Any] | CLIPVisionConfig | None = None
    mm_visual_tower: str = TOWER_FOLDER
    event_feature_adaptor: bool | str | None = None
    """The published code asks whether the key is there: any value but null means an adaptor."""
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    tokenizer_model_max_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or _PUBLISHED_VISION))
        super().__post_init__(**kwargs)


class EventGPT(LlamaForCausalLM):  # type: ignore[misc]
    """Llama with a visual front end under the published tensor names."""

    config_class = EventGPTConfig

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        width = config.hidden_size
        # The published names nest the tower twice.
        self.model.visual_tower = nn.ModuleDict({"visual_tower": CLIPVisionModel(vision)})
        self.model.visual_projector = nn.Sequential(
            nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        has_adaptor = config.event_feature_adaptor is not None
        self.model.feature_adaptor = nn.Linear(width, width) if has_adaptor else nn.Identity()
        self.post_init()

    @property
    def tower(self) -> Any:
        return self.model.visual_tower["visual_tower"]

    def visual_tokens(
        self, pixels: Float[Tensor, "*batch T 3 H W"], tower_features: Features | None = None
    ) -> Float[Tensor, "*batch visual D"]:
        """T event images to T temporal tokens (means over space), then the spatial ones.

        The projector's second map and the adaptor are affine, so they come after the means, on
        T + 577 rows instead of T x 577. ``tower_features``: None: the tower's modules'.
        """
        features_of_tower = tower_features or partial(clip_features, self.tower, layer=-1)
        features = features_of_tower(pixels.flatten(0, -4).to(self.dtype))
        into, activation, out_of = self.model.visual_projector
        features = activation(into(features)).unflatten(0, pixels.shape[:-3])
        pooled = torch.cat([features.mean(-2), features.mean(-3)], dim=-2)
        tokens: Tensor = self.model.feature_adaptor(out_of(pooled))
        return tokens


def load(
    folder: Path, placement: Placement | None = None, tower: Path | None = None
) -> tuple[EventGPT, ImageProcessing]:
    """A published or an own checkpoint, and the image processor of its tower.

    Args:
        folder: ``config.json`` and weights (safetensors or ``.bin``, sharded or not).
        placement: None: on the CPU, in the checkpoint's precision.
        tower: folder with the CLIP tower's ``config.json`` and ``preprocessor_config.json``;
            None takes the folder the configuration names, or what is built in.

    Raises:
        XsdError: a file is missing or unreadable, or the tensors are not exactly the model's.
    """
    config, processing = read_config(folder, tower)
    return load_weights(EventGPT, config, folder, placement or Placement()), processing


def read_config(folder: Path, tower: Path | None = None) -> tuple[EventGPTConfig, ImageProcessing]:
    """The configuration of a checkpoint and of its tower; weights are not looked at."""
    config = load_config(EventGPTConfig, folder)
    config.vision_config, processing = _tower(folder, config, tower)
    return config, processing


def published_config() -> tuple[EventGPTConfig, ImageProcessing]:
    """Of the 7B release."""
    config = EventGPTConfig(
        event_feature_adaptor=True, max_position_embeddings=4096, rms_norm_eps=1e-5
    )
    vision: Any = config.vision_config
    return config, ImageProcessing.square(vision.image_size)


def save(model: EventGPT, processing: ImageProcessing, folder: Path) -> None:
    """Write the published layout: the tower's configuration apart, in a folder of its own."""
    with staged(folder) as staging:
        model.save_pretrained(staging)
        config = read_json(staging / "config.json") | {"mm_visual_tower": TOWER_FOLDER}
        vision = config.pop("vision_config")
        # To the published code a key that is there, even as null, says something.
        present = {key: value for key, value in config.items() if value is not None}
        write_json(staging / "config.json", present)
        write_json(staging / TOWER_FOLDER / "config.json", vision)
        processing.save(staging / TOWER_FOLDER)


def _tower(
    folder: Path, config: EventGPTConfig, override: Path | None
) -> tuple[CLIPVisionConfig, ImageProcessing]:
    """The tower's configuration and processor; its weights are in the checkpoint."""
    named = Path(config.mm_visual_tower)
    # As it is named, from here or from beside us; or a folder of that name beside us.
    places = [folder / named, folder.parent / named, folder.parent / named.name]
    for tower in [override] if override else places:
        if (tower / "config.json").is_file():
            return _tower_config(tower), ImageProcessing.load(tower)
    if override is None and named.name == PUBLISHED_TOWER:
        published: Any = EventGPTConfig().vision_config
        return published, ImageProcessing.square(published.image_size)
    raise XsdError(
        f"{override or places[0]}: no config.json of the CLIP tower that {folder / 'config.json'} "
        f"names; put its two JSON files into {places[-1]} or name their folder with --tower"
    )


def _tower_config(tower: Path) -> CLIPVisionConfig:
    values = read_json(tower / "config.json")
    # The hub's own file describes both of CLIP's towers.
    values = values.get("vision_config", values)
    config: CLIPVisionConfig = CLIPVisionConfig.from_dict(values)
    return config


class EventGPTDecoder(LlamaDecoder):
    """EventGPT as a half of a pair. Takes the model over: its projections are fused."""

    def __init__(self, model: EventGPT, tokenizer: Any, processing: ImageProcessing) -> None:
        super().__init__(model.model, model.lm_head, tokenizer, model.generation_config)
        self.model = model
        self.processing = processing
        self.features = features_of(model.tower, layer=-1, crew=self.crew)
        self._visual = Again(partial(model.visual_tokens, tower_features=self.features))
        self.max_sequence = model.config.tokenizer_model_max_length or MAX_SEQUENCE

    def prompt(self, question: str) -> Prompt:
        """Vicuna's first template around ``<ev_start>``, the events, ``<ev_end>``."""
        if PLACEHOLDER in question:
            raise XsdError(f"question {question!r}: it must not hold {PLACEHOLDER}; take it out")
        return prompt_around(
            self.tokenizer,
            f"{SYSTEM} USER: <ev_start>",
            f"<ev_end>\n{question} ASSISTANT:",
        )

    def pixels(self, media: Media) -> Float[Tensor, "N 3 H W"]:
        return self.processing(media.event_images, self.stack.device, self.crew)

    @torch.inference_mode()
    def visual_tokens(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "visual D"]:
        return self._visual(pixels.to(self.stack.device))

    def embed_prompt(
        self, prompt: Prompt, visual: Float[Tensor, "visual D"]
    ) -> Float[Tensor, "1 P D"]:
        return super().embed_prompt(prompt, visual)[:, : self.max_sequence]
