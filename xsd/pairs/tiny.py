"""The embedded pair: small models of the real pair's own classes, shipped with the package.

Their weights are package data (``tiny_weights/``), made by the ``pretrain`` command; the model
card beside them says how well they do. Everything else (prompts, placeholders, pooling,
processors) is the real pair's code at smaller sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, VideoLlavaConfig

from xsd.pairs.eventgpt import EventGPTConfig
from xsd.pairs.processing import ImageProcessing

NUM_EVENT_IMAGES = 5
NUM_FRAMES = 8
IMAGE_SIZE = 64
PATCH_SIZE = 16
VOCAB_SIZE = 1024
VERIFIER_VOCAB_SIZE = 1032
"""The verifier's head has a few rows more than the tokenizer, as the released one."""
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 1024, 1025


@dataclass(frozen=True)
class Text:
    """Sizes of a language model."""

    num_layers: int
    width: int
    ffn: int
    num_heads: int
    first_layers: int
    """So many learn the facts and the first words; the others are grown on top of them."""


@dataclass(frozen=True)
class Size:
    """Sizes of a pair whose images and words are the tiny one's."""

    vision_width: int
    vision_ffn: int
    verifier_vision_layers: int
    drafter_vision_layers: int
    verifier: Text
    drafter: Text


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        # Deep and narrow: on a CPU a step costs by the layer, so depth is what makes it slow. The
        # drafter is shallow, as a drafter should be.
        "tiny": Size(96, 192, 3, 2, Text(12, 128, 256, 4, 5), Text(2, 128, 256, 4, 2)),
        "lab": Size(192, 384, 4, 3, Text(32, 768, 2048, 12, 5), Text(4, 512, 1408, 8, 4)),
    }
)
WIDTH = SIZES["tiny"].verifier.width
Name = Literal["tiny", "lab"]


def weights_folder() -> Path:
    """Where the shipped weights lie."""
    return Path(str(resources.files("xsd.pairs") / "tiny_weights"))


@cache
def processing() -> ImageProcessing:
    """The image processor of both towers."""
    return ImageProcessing.square(IMAGE_SIZE)


def _vision_config(num_layers: int, size: Size) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )


def _text_config(text: Text, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.ffn,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def verifier_config(name: Name = "tiny") -> VideoLlavaConfig:
    size = SIZES[name]
    tokens_per_frame = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    return VideoLlavaConfig(
        vision_config=_vision_config(size.verifier_vision_layers, size),
        text_config=LlamaConfig(**_text_config(size.verifier, VERIFIER_VOCAB_SIZE)),
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=VIDEO_TOKEN_ID,
        image_seq_length=tokens_per_frame - 1,
        video_seq_length=NUM_FRAMES * tokens_per_frame,
        vision_feature_layer=-2,
    )


def drafter_config(name: Name = "tiny") -> EventGPTConfig:
    size = SIZES[name]
    return EventGPTConfig(
        **_text_config(size.drafter, VOCAB_SIZE),
        vision_config=_vision_config(size.drafter_vision_layers, size),
        event_feature_adaptor=True,
    )


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE in Llama's manner, small enough that every word used is one token."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials + byte_tokens,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Byte tokens are ordinary vocabulary, not special: decoding must not drop them.
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_without_special_bytes(state, len(specials)))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<image>", "<video>"])  # ids 1024 and 1025
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _without_special_bytes(state: str, num_specials: int) -> str:
    import json

    value = json.loads(state)
    value["added_tokens"] = value["added_tokens"][:num_specials]
    return json.dumps(value)
