"""Names of pairs -> loaded pairs. A third pair is a row here, or a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from xsd.errors import XsdError
from xsd.pairs import released, tokens
from xsd.pairs.base import Decoder, ModelPair, PairSpec, Source
from xsd.pairs.config import PairConfig

PAIRS: Mapping[str, PairSpec] = MappingProxyType(
    {
        "tiny": released.spec("fp32", released.embedded),
        "lab": released.spec("bf16", released.given),
        "eventgpt-video-llava": released.spec("bf16", released.given),
    }
)
ATTRIBUTE = "PAIR"
"""What a module that is named as a pair must hold: its ``PairSpec``."""


def find_pair(name: str) -> PairSpec:
    """The row of a name, or ``PAIR`` of the module that the name imports.

    Raises:
        XsdError: neither.
    """
    if name in PAIRS:
        return PAIRS[name]
    known = f"choose one of {', '.join(PAIRS)}, or a module that holds {ATTRIBUTE} (docs/pairs.md)"
    if not all(part.isidentifier() for part in name.split(".")):
        raise XsdError(f"unknown pair {name!r}; {known}")
    try:
        found = getattr(importlib.import_module(name), ATTRIBUTE, None)
    except ImportError as error:
        # A name may be a slip, or a module that lacks something itself.
        why = "" if getattr(error, "name", None) == name else f" ({error})"
        raise XsdError(f"unknown pair {name!r}{why}; {known}") from error
    if not isinstance(found, PairSpec):
        raise XsdError(f"pair {name!r}: the module has no PairSpec named {ATTRIBUTE}; {known}")
    return found


def sources(config: PairConfig) -> Mapping[str, Source]:
    """What ``drafter`` and ``verifier`` are made of; nothing is loaded.

    Raises:
        XsdError: unknown pair, or a folder that is missing.
    """
    return find_pair(config.pair).sources(config)


def precision(config: PairConfig) -> str:
    """The precision the pair runs in: the one asked for, or its own.

    Raises:
        XsdError: unknown pair.
    """
    return config.quant or find_pair(config.pair).default_quant


def load_pair(config: PairConfig) -> ModelPair:
    """Both models, in eval mode.

    Raises:
        XsdError: unknown pair, missing or unfit checkpoint, a device or memory that is not to be
            had, tokenizers that disagree.
    """
    return _load(find_pair(config.pair), config)


def load_drafter(config: PairConfig, vocab_size: int) -> Decoder:
    """The drafter alone, choosing among the ids that its pair shares.

    Args:
        vocab_size: ``ModelPair.vocab_size``, from whoever has loaded both.

    Raises:
        XsdError: see ``load_pair``.
    """
    drafter = find_pair(config.pair).drafter(config, precision(config))
    drafter.limit_vocab(vocab_size)
    return drafter


def load_folder(folder: Path, device: str = "cpu") -> ModelPair:
    """A pair as ``pretrain`` leaves it: ``drafter``, ``verifier`` and their ``tokenizer``."""
    spec = released.spec("fp32", lambda _: released.inside(folder))
    return _load(spec, PairConfig(device=device))


def _load(spec: PairSpec, config: PairConfig) -> ModelPair:
    quant = config.quant or spec.default_quant
    drafter, verifier = spec.drafter(config, quant), spec.verifier(config, quant)
    num_shared = min(drafter.vocab_size, verifier.vocab_size)
    tokens.refuse_other(drafter.tokenizer, verifier.tokenizer, num_shared)
    return ModelPair(
        name=config.pair,
        drafter=drafter,
        verifier=verifier,
        num_event_images=config.num_event_images,
        num_frames=spec.num_frames,
        quant=quant,
        provenance={role: source.digest for role, source in spec.sources(config).items()},
    )
