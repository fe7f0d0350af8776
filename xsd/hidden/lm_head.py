"""Stage 0: the verifier's LM head and input embeddings, taken out of its checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xsd.errors import XsdError
from xsd.files import atomic_path, read_json, sha256_file, sha256_json, write_json

HEAD, EMBEDDINGS = "lm_head", "embed_tokens"
_INDEX = "lm_head.json"
_TENSOR = {HEAD: "lm_head.weight", EMBEDDINGS: "embed_tokens.weight"}
"""How the tensors' names end in every release of a Llama."""


@dataclass(frozen=True)
class VerifierHead:
    """Both ends of the verifier's language model."""

    lm_head: Float[Tensor, "V Dv"]
    """All rows of the checkpoint, or those that a pair chooses among."""
    embed_tokens: Float[Tensor, "ids Dv"]
    digest: str
    provenance: str
    """Of the checkpoint it was taken from."""


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Head and embeddings with rows and dtype as in the checkpoint; nothing else is loaded.

    A checkpoint without a head of its own ties it to the embeddings.

    Raises:
        XsdError: no weights, unreadable ones, or no such tensors among them.
    """
    found: dict[str, Tensor] = {}
    for path in _weight_files(checkpoint):
        with _opened(path) as (names, get):
            for name in names:
                for key, ending in _TENSOR.items():
                    if name == ending or name.endswith(f".{ending}"):
                        found[key] = get(name).clone()
    if EMBEDDINGS not in found:
        raise XsdError(
            f"{checkpoint}: none of its tensors is {_TENSOR[EMBEDDINGS]}; check the path"
        )
    return {key: found.get(key, found[EMBEDDINGS]) for key in _TENSOR}


def save(tensors: dict[str, Tensor], path: Path, provenance: str) -> list[Path]:
    """Write ``path`` (the head), ``embed_tokens.safetensors`` and ``lm_head.json`` beside it."""
    files = {HEAD: path, EMBEDDINGS: path.with_name(f"{EMBEDDINGS}.safetensors")}
    for key, file in files.items():
        with atomic_path(file) as temporary:
            save_file({key: tensors[key].contiguous()}, temporary)
    about = {
        key: {
            "path": file.name,
            "rows": len(tensors[key]),
            "width": tensors[key].shape[1],
            "dtype": str(tensors[key].dtype).removeprefix("torch."),
            "num_bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for key, file in files.items()
    }
    index = path.with_name(_INDEX)
    write_json(index, {**about, "provenance": provenance})
    return [*files.values(), index]


def load(path: Path) -> VerifierHead:
    """Read what ``save`` wrote, in float32, checked by sha256.

    Args:
        path: the folder, or the head's file.

    Raises:
        XsdError: a file is missing, altered, or not what its index says.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / _INDEX).is_file():
        raise XsdError(f"{folder}: no {_INDEX}, so no LM head; make one with 'xsd lm_head'")
    about = read_json(folder / _INDEX)
    try:
        tensors = {key: _load_one(folder, key, about[key]) for key in _TENSOR}
        digest = sha256_json([about[key]["sha256"] for key in _TENSOR])
        return VerifierHead(tensors[HEAD], tensors[EMBEDDINGS], digest, str(about["provenance"]))
    except (KeyError, TypeError) as error:
        raise XsdError(f"{folder / _INDEX}: not the index of an LM head ({error!r})") from error


def _load_one(folder: Path, key: str, about: dict[str, Any]) -> Tensor:
    path = folder / Path(about["path"]).name
    if not path.is_file() or sha256_file(path) != about["sha256"]:
        raise XsdError(f"{path}: missing or altered; make it again with 'xsd lm_head'")
    return load_file(path)[key].float()


def _weight_files(checkpoint: Path) -> list[Path]:
    files = sorted(checkpoint.glob("*.safetensors")) or sorted(checkpoint.glob("*.bin"))
    if not files:
        raise XsdError(f"{checkpoint}: holds neither .safetensors nor .bin weights; check the path")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Any]]:
    """Names of a file's tensors, and a way to get one without reading the others."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield list(file.keys()), file.get_tensor
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            yield list(state), state.__getitem__
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise XsdError(f"{path}: weights cannot be read ({line})") from error
