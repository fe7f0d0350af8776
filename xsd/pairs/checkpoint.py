"""Folders of weights in transformers' layout: strict loading, whole-or-absent saving.

transformers reads the files (safetensors or pickled weights, one or sharded, renamed to its
present module names) straight into place; what it would only warn about is an error here.
"""

from __future__ import annotations

import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from xsd.errors import XsdError
from xsd.files import atomic_path, read_json

# Buffers that older releases wrote into checkpoints; they follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


def load_config(config_class: type[PreTrainedConfig], folder: Path) -> Any:
    """Read ``config.json`` into a configuration class.

    Raises:
        XsdError: no such file, another model's, or values that cannot be.
    """
    path = folder / "config.json"
    values = read_json(path)
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != config_class.model_type:
        raise XsdError(f"{path}: model_type is {found!r}, {config_class.model_type!r} is needed")
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise XsdError(f"{path}: not a usable configuration ({_line(error)})") from error


def load_weights(
    model_class: type[PreTrainedModel],
    config: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Any:
    """The model in eval mode on ``device``; ``dtype`` None keeps the checkpoint's.

    Raises:
        XsdError: a file cannot be read, or its tensors are not exactly the model's.
    """
    device = torch.device(device)
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                device_map=None if device.type == "cpu" else {"": device},
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError) as error:
        raise XsdError(f"{folder}: weights cannot be loaded ({_line(error)})") from error
    for what, keys in (
        ("missing", report["missing_keys"]),
        ("not the model's", report["unexpected_keys"]),
        ("of another shape", [key for key, *_ in report["mismatched_keys"]]),
    ):
        _refuse(folder, what, sorted(key for key in keys if not IGNORED.search(key)))
    return model.eval()


def _refuse(folder: Path, what: str, keys: list[str]) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise XsdError(
            f"{folder}: tensors {what}: {', '.join(keys[:3])}{more}; "
            "the checkpoint and its config.json do not belong together"
        )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder``, one by one and whole, at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staging = Path(scratch)
        with _quiet():
            yield staging
        for source in sorted(path for path in staging.rglob("*") if path.is_file()):
            with atomic_path(folder / source.relative_to(staging)) as target:
                shutil.move(source, target)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: a load is silent, and a command has bars of its own."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
