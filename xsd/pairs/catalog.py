"""Names of pairs -> loaded pairs. A third pair is one more row here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer
from transformers.utils import logging

from xsd.errors import XsdError
from xsd.files import sha256_file, sha256_json
from xsd.pairs import eventgpt, tiny, video_llava
from xsd.pairs.base import ModelPair
from xsd.pairs.config import PairConfig
from xsd.pairs.device import choose_device
from xsd.pairs.eventgpt import EventGPTDecoder
from xsd.pairs.quantise import COMPUTE_DTYPE, quantise
from xsd.pairs.video_llava import VideoLlavaDecoder

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
QUANTS = (*DTYPES, "8bit", "4bit")
_WEIGHTS = ("*.safetensors", "*.bin")
_HASHED_BYTES = 256 << 20
_EDGE_BYTES = 1 << 20
_PROBE = "A red car waits on the left, near two cyclists."


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a pair's two checkpoints and their tokenizers lie."""

    drafter: Path
    verifier: Path
    drafter_tokenizer: Path
    verifier_tokenizer: Path


def _inside(root: Path) -> Folders:
    drafter, verifier, tokenizer = (root / name for name in ("drafter", "verifier", "tokenizer"))
    for folder in (drafter, verifier, tokenizer):
        if not folder.is_dir():
            raise XsdError(
                f"{folder}: the tiny pair's weights are missing; install the package again, "
                "or make them with 'xsd pretrain'"
            )
    return Folders(drafter, verifier, tokenizer, tokenizer)


def _tiny(config: PairConfig) -> Folders:
    shipped = _inside(tiny.weights_folder())
    given = {
        role: Path(path) for role in ("drafter", "verifier") if (path := getattr(config, role))
    }
    return replace(shipped, **given)


def _released(config: PairConfig) -> Folders:
    drafter, verifier = (_folder(config, role) for role in ("drafter", "verifier"))
    return Folders(drafter, verifier, drafter, verifier)


def _folder(config: PairConfig, role: str) -> Path:
    """A checkpoint's folder; one that is on the hub is downloaded (once)."""
    given = getattr(config, role)
    if not given:
        raise XsdError(
            f"pair {config.pair!r} needs --{role}, a folder or the hub id of a checkpoint"
        )
    if not Path(given).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        try:
            return Path(snapshot_download(given))
        except (OSError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise XsdError(f"--{role} {given}: neither a folder nor on the hub ({line})") from error
    if not Path(given).is_dir():
        raise XsdError(f"--{role} {given}: no such folder; download the checkpoint there")
    return Path(given)


@dataclass(frozen=True, slots=True)
class _Row:
    folders: Callable[[PairConfig], Folders]
    default_quant: str


PAIRS: Mapping[str, _Row] = MappingProxyType(
    {"tiny": _Row(_tiny, "fp32"), "eventgpt-video-llava": _Row(_released, "bf16")}
)


def checkpoint_folders(config: PairConfig) -> Folders:
    """Where the pair's files lie; nothing is loaded.

    Raises:
        XsdError: unknown pair, or a folder that is missing.
    """
    return _row(config).folders(config)


def precision(config: PairConfig) -> str:
    """The precision the pair runs in: the one asked for, or its own."""
    return config.quant or _row(config).default_quant


def load_pair(config: PairConfig) -> ModelPair:
    """Both models, in eval mode on one device.

    Raises:
        XsdError: unknown pair, missing or unfit checkpoint, a precision or device that is not to
            be had, tokenizers that disagree.
    """
    quant = precision(config)
    if quant not in QUANTS:
        raise XsdError(f"--quant {quant}: choose one of {', '.join(QUANTS)}")
    return _load(checkpoint_folders(config), config.pair, quant, choose_device(config.device))


def load_folder(folder: Path) -> ModelPair:
    """A pair as ``pretrain`` leaves it: ``drafter``, ``verifier`` and their ``tokenizer``."""
    return _load(_inside(folder), "tiny", "fp32", torch.device("cpu"))


def _load(folders: Folders, name: str, quant: str, device: torch.device) -> ModelPair:
    is_quantised = quant in COMPUTE_DTYPE
    # Quantised weights are rounded on their way to the device, layer by layer.
    how: dict[str, Any] = {
        "dtype": {**DTYPES, **COMPUTE_DTYPE}[quant],
        "device": "cpu" if is_quantised else device,
    }
    events, event_processing = eventgpt.load(folders.drafter, **how)
    video, video_processing = video_llava.load(folders.verifier, **how)
    if is_quantised:
        for model, layers in ((events, events.model), (video, video.model.language_model)):
            quantise(layers, quant)
            model.to(device)
    drafter = EventGPTDecoder(events, _tokenizer(folders.drafter_tokenizer), event_processing)
    verifier = VideoLlavaDecoder(video, _tokenizer(folders.verifier_tokenizer), video_processing)
    _refuse_other_tokens(drafter.tokenizer, verifier.tokenizer)
    return ModelPair(
        name=name,
        drafter=drafter,
        verifier=verifier,
        num_event_images=tiny.NUM_EVENT_IMAGES,
        num_frames=tiny.NUM_FRAMES,
        quant=quant,
        provenance=provenance(folders),
    )


def provenance(folders: Folders) -> dict[str, str]:
    """Digest of each model's weights and configuration; the hub's revision where one is known."""
    return {role: _digest(getattr(folders, role)) for role in ("drafter", "verifier")}


def _row(config: PairConfig) -> _Row:
    if config.pair not in PAIRS:
        raise XsdError(f"unknown pair {config.pair!r}; choose one of {', '.join(PAIRS)}")
    return PAIRS[config.pair]


def _tokenizer(folder: Path) -> Any:
    # It wonders aloud about EventGPT's model type, which is not its business.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        line = " ".join(str(error).split())[:200]
        raise XsdError(f"{folder}: its tokenizer cannot be loaded ({line})") from error
    finally:
        logging.set_verbosity(verbosity)


def _refuse_other_tokens(drafter: Any, verifier: Any) -> None:
    """A draft is a token id: both models must mean the same by it."""
    ids = [tokenizer.encode(_PROBE, add_special_tokens=False) for tokenizer in (drafter, verifier)]
    if ids[0] != ids[1]:
        raise XsdError("drafter and verifier tokenize differently; a pair shares one tokenizer")


def _digest(folder: Path) -> str:
    """Of the configuration and the weights; of files too large to hash, size and both ends."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":
        return f"hub:{resolved.name}"
    files = [folder / "config.json", *(p for kind in _WEIGHTS for p in sorted(folder.glob(kind)))]
    return "sha256:" + sha256_json({p.name: _file_digest(p) for p in files if p.is_file()})


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= _HASHED_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        digest.update(handle.read(_EDGE_BYTES))
        handle.seek(-_EDGE_BYTES, 2)
        digest.update(handle.read())
    return digest.hexdigest()
