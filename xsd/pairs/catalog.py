"""Names of pairs -> loaded pairs. A third pair is a row here, or a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from xsd.errors import XsdError
from xsd.pairs import released
from xsd.pairs.base import ModelPair, PairSpec, Source
from xsd.pairs.config import PairConfig

PAIRS: Mapping[str, PairSpec] = MappingProxyType(
    {
        "tiny": PairSpec(
            "fp32",
            partial(released.sources, locate=released.embedded),
            partial(released.load, locate=released.embedded),
        ),
        "eventgpt-video-llava": PairSpec(
            "bf16",
            partial(released.sources, locate=released.given),
            partial(released.load, locate=released.given),
        ),
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
        XsdError: unknown pair, missing or unfit checkpoint, a precision, device or memory that is
            not to be had, tokenizers that disagree.
    """
    return find_pair(config.pair).load(config, precision(config))


def load_folder(folder: Path) -> ModelPair:
    """A pair as ``pretrain`` leaves it: ``drafter``, ``verifier`` and their ``tokenizer``."""
    return released.load(PairConfig(device="cpu"), "fp32", locate=lambda _: released.inside(folder))
