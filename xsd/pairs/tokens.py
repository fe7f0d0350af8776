"""The one vocabulary of a pair: loading its tokenizers, and refusing two that disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from xsd.errors import XsdError

_FILES = ("tokenizer.json", "tokenizer.model")
_PROBES = (
    "A red car waits on the left, near two cyclists.",
    "USER: What vehicles are present?\nASSISTANT: 3 trucks; 1 bus (blue) & a tram\u2026",
    "\u00fcber  two spaces",
)
"""Equal vocabularies may still be applied differently: merges, normalisation, word starts."""


def is_in(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def load(folder: Path) -> Any:
    """The tokenizer of a checkpoint's folder.

    Raises:
        XsdError: there is none, or it cannot be read here.
    """
    if not is_in(folder):
        raise XsdError(
            f"{folder}: holds no tokenizer ({' or '.join(_FILES)}); copy the checkpoint's there"
        )
    # It wonders aloud about EventGPT's model type, which is not its business.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise XsdError(
            f"{folder}: its tokenizer cannot be loaded ({line}); copy the files again, "
            "and pip install sentencepiece if it is a tokenizer.model"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def refuse_other(drafter: Any, verifier: Any, num_shared: int) -> None:
    """A draft is a token id: both models must mean the same by each one they share.

    Args:
        num_shared: ids that both models choose among.

    Raises:
        XsdError: an id below ``num_shared`` is another token to each, or they split text
            differently.
    """
    ours, theirs = (_by_id(tokenizer, num_shared) for tokenizer in (drafter, verifier))
    both = ours.keys() & theirs.keys()
    other = sorted(index for index in both if ours[index] != theirs[index])
    if other:
        at = other[0]
        raise XsdError(
            f"drafter and verifier tokenize differently: id {at} is {ours[at]!r} and "
            f"{theirs[at]!r}, and so {len(other)} ids; a pair shares one vocabulary"
        )
    for probe in _PROBES:
        ids = [
            list(tokenizer.encode(probe, add_special_tokens=False))
            for tokenizer in (drafter, verifier)
        ]
        if ids[0] != ids[1]:
            raise XsdError(
                f"drafter and verifier tokenize differently: {probe!r} becomes {len(ids[0])} and "
                f"{len(ids[1])} tokens, not the same ones; a pair shares one tokenizer"
            )


def _by_id(tokenizer: Any, limit: int) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items() if index < limit}
