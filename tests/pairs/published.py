"""Checkpoints at toy sizes, in the formats and under the names in which the real ones come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, VideoLlavaForConditionalGeneration

from tests.pairs import toy
from xsd.pairs import eventgpt, video_llava
from xsd.pairs.eventgpt import SYSTEM, EventGPT
from xsd.pairs.processing import ImageProcessing
from xsd.scenes.questions import QUESTIONS

VOCAB = 400
STOPS = list(range(300, 320))
"""Many ids end an answer, so that random answers differ in length."""


def write_sentencepiece(folder: Path) -> Path:
    """``tokenizer.model`` as Llama's: BPE with byte fallback, its settings beside it; no JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SYSTEM, "USER: ASSISTANT:", *QUESTIONS] * 3),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    special = {
        key: {
            "__type": "AddedToken", "content": text, "lstrip": False,
            "normalized": False, "rstrip": False, "single_word": False,
        }
        for key, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }  # fmt: skip
    about = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def write_pair(root: Path, width: int = 32) -> tuple[Path, Path]:
    """Both folders; EventGPT's tower is described in a folder beside its own."""
    torch.manual_seed(0)
    drafter, verifier = root / "EventGPT-7b", root / "Video-LLaVA-7B-hf"
    _write_eventgpt(drafter, width)
    _write_video_llava(verifier, drafter, width)
    return drafter, verifier


def _write_eventgpt(folder: Path, width: int) -> None:
    model = EventGPT(toy.drafter_config(width, vocab_size=VOCAB)).eval()
    model.generation_config.eos_token_id = STOPS
    eventgpt.save(model, ImageProcessing.square(toy.IMAGE), folder)
    (folder / "clip").rename(folder.parent / "clip-vit-toy")
    about = json.loads((folder / "config.json").read_text())
    about["mm_visual_tower"] = "somebody/clip-vit-toy"
    (folder / "config.json").write_text(json.dumps(about))
    tower = "model.visual_tower.visual_tower"
    tensors = {
        name.replace(f"{tower}.", f"{tower}.vision_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors[f"{tower}.vision_model.embeddings.position_ids"] = torch.zeros(1, 5).long()
    (folder / "model.safetensors").unlink()
    _write_shards(tensors, folder, "pytorch_model", ".bin", torch.save)
    write_sentencepiece(folder)


def _write_video_llava(folder: Path, drafter: Path, width: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(drafter)
    tokenizer.add_tokens(["<image>", "<video>", "<pad>"], special_tokens=True)
    video = tokenizer.convert_tokens_to_ids("<video>")
    assert video == VOCAB + 1
    config = toy.verifier_config(width + 8, video, vocab_size=VOCAB + 64)
    model = VideoLlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = STOPS
    video_llava.save(model, ImageProcessing.square(toy.IMAGE), folder)
    tensors = {
        old_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    _write_shards(tensors, folder, "model", ".safetensors", _save_safetensors)
    tokenizer.save_pretrained(folder)


def old_name(name: str) -> str:
    """Transformers 4's: towers under ``vision_model``, the language model at the top."""
    name = name.removeprefix("model.")
    for tower in ("video_tower", "image_tower"):
        if not name.startswith(f"{tower}.vision_model."):
            name = name.replace(f"{tower}.", f"{tower}.vision_model.")
    if name.startswith("language_model.") and "language_model.model." not in name:
        name = name.replace("language_model.", "language_model.model.")
    return "language_model.lm_head.weight" if "lm_head" in name else name


def _write_shards(
    tensors: Mapping[str, Tensor],
    folder: Path,
    stem: str,
    suffix: str,
    write: Callable[[dict[str, Tensor], Path], Any],
) -> None:
    names = sorted(tensors)
    where = {}
    for part in range(3):
        file = f"{stem}-{part + 1:05d}-of-00003{suffix}"
        write({name: tensors[name] for name in names[part::3]}, folder / file)
        where |= dict.fromkeys(names[part::3], file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})
