"""EventGPT and Video-LLaVA from folders, from the hub, from the package, or drawn at random."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from xsd.errors import XsdError
from xsd.files import sha256_file, sha256_json
from xsd.pairs import eventgpt, tiny, tokens, video_llava
from xsd.pairs.base import PairSpec, Source
from xsd.pairs.checkpoint import Placement, draw_weights, load_weights
from xsd.pairs.config import PairConfig
from xsd.pairs.device import ROLES, choose_devices
from xsd.pairs.eventgpt import EventGPT, EventGPTDecoder
from xsd.pairs.video_llava import VideoLlava, VideoLlavaDecoder

_WEIGHTS = ("*.safetensors", "*.bin")
_HASHED_BYTES = 256 << 20
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a pair's two checkpoints and their tokenizers lie; None: nowhere, as in the release."""

    drafter: Path | None
    verifier: Path | None
    drafter_tokenizer: Path
    verifier_tokenizer: Path


Locate = Callable[[PairConfig], Folders]


def inside(root: Path) -> Folders:
    """A folder as ``pretrain`` leaves it.

    Raises:
        XsdError: one of the three is not there.
    """
    drafter, verifier, tokenizer = (root / name for name in ("drafter", "verifier", "tokenizer"))
    for folder in (drafter, verifier, tokenizer):
        if not folder.is_dir():
            raise XsdError(
                f"{folder}: the tiny pair's weights are missing; install the package again, "
                "or make them with 'xsd pretrain'"
            )
    return Folders(drafter, verifier, tokenizer, tokenizer)


def embedded(config: PairConfig) -> Folders:
    """The tiny pair's: package data, unless others are named."""
    shipped = inside(tiny.weights_folder())
    named = {role: Path(path) for role in ROLES if (path := getattr(config, role))}
    return replace(shipped, **named)


def given(config: PairConfig) -> Folders:
    """Those that the flags name; random weights need none."""
    drafter, verifier = (_folder(config, role) for role in ROLES)
    return Folders(drafter, verifier, _tokenizer(drafter, config), _tokenizer(verifier, config))


def _tokenizer(folder: Path | None, config: PairConfig) -> Path:
    """The folder's own; random weights get along with the embedded one."""
    if config.weights == "random" and (folder is None or not tokens.is_in(folder)):
        return tiny.weights_folder() / "tokenizer"
    assert folder is not None, "only random weights need no folder"
    shared = folder.parent / "tokenizer"
    # ``pretrain`` keeps one for both.
    return shared if tokens.is_in(shared) and not tokens.is_in(folder) else folder


def spec(default_quant: str, locate: Locate) -> PairSpec:
    """The released pair's row of the catalog, with its files wherever ``locate`` says."""
    return PairSpec(
        default_quant,
        partial(sources, locate=locate),
        partial(drafter, locate=locate),
        partial(verifier, locate=locate),
        tiny.NUM_FRAMES,
    )


def sources(config: PairConfig, locate: Locate) -> dict[str, Source]:
    """Digest of each model's weights and configuration; the hub's revision where one is known."""
    folders = locate(config)
    return {role: _source(getattr(folders, role), config, role) for role in ROLES}


def drafter(config: PairConfig, quant: str, locate: Locate) -> EventGPTDecoder:
    """EventGPT on its device.

    Raises:
        XsdError: see ``catalog.load_pair``.
    """
    folders = locate(config)
    tokenizer = tokens.load(folders.drafter_tokenizer)
    if folders.drafter is None:
        settings, processing = eventgpt.published_config()
    else:
        tower = Path(config.tower) if config.tower else None
        settings, processing = eventgpt.read_config(folders.drafter, tower)
    placement = Placement(quant, choose_devices(config)["drafter"])
    model = _model(EventGPT, settings, folders.drafter, placement, config)
    return EventGPTDecoder(model, tokenizer, processing)


def verifier(config: PairConfig, quant: str, locate: Locate) -> VideoLlavaDecoder:
    """Video-LLaVA on its device.

    Raises:
        XsdError: see ``catalog.load_pair``.
    """
    folders = locate(config)
    tokenizer = tokens.load(folders.verifier_tokenizer)
    if folders.verifier is None:
        settings, processing = video_llava.published_config()
    else:
        settings, processing = video_llava.read_config(folders.verifier)
    if config.weights == "random":
        # A tokenizer from elsewhere has ids of its own for the placeholders.
        settings.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
        settings.video_token_index = tokenizer.convert_tokens_to_ids("<video>")
    placement = Placement(quant, choose_devices(config)["verifier"])
    model = _model(VideoLlava, settings, folders.verifier, placement, config)
    return VideoLlavaDecoder(model, tokenizer, processing)


def _model(
    model_class: Any,
    settings: Any,
    folder: Path | None,
    placement: Placement,
    config: PairConfig,
) -> Any:
    if config.weights == "random":
        return draw_weights(model_class, settings, placement)
    assert folder is not None, "only random weights need no folder"
    return load_weights(model_class, settings, folder, placement)


def _folder(config: PairConfig, role: str) -> Path | None:
    """A checkpoint's folder; one that is on the hub is downloaded (once)."""
    named = getattr(config, role)
    if not named:
        if config.weights == "random":
            return None
        raise XsdError(
            f"pair {config.pair!r} needs --{role}, a folder or the hub id of a checkpoint; "
            "or --weights random, to time it without"
        )
    if not Path(named).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        try:
            return Path(snapshot_download(named))
        except (OSError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise XsdError(f"--{role} {named}: neither a folder nor on the hub ({line})") from error
    if not Path(named).is_dir():
        raise XsdError(f"--{role} {named}: no such folder; download the checkpoint there")
    return Path(named)


def _source(folder: Path | None, config: PairConfig, role: str) -> Source:
    if config.weights == "random":
        shape = "published" if folder is None else sha256_file(folder / "config.json")
        return Source(f"random {role}", f"random:{shape}")
    assert folder is not None, "only random weights need no folder"
    return Source(str(folder), _digest(folder), folder)


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
