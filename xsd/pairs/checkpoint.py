"""Weights of transformers' models: strict loading, drawing at random, whole-or-absent saving.

transformers maps the files (safetensors or pickled weights, one or sharded, under the module names
of any release) and copies tensor after tensor into place; what it would only warn about is an
error here. So a load takes the model's own memory, in the precision asked for, and no second copy.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from xsd.errors import XsdError
from xsd.files import atomic_path, make_folder, read_json
from xsd.pairs.device import free_bytes
from xsd.pairs.quantise import (
    DTYPES,
    QUANTISED,
    load_library,
    num_bytes,
    plain_linears,
    quantise,
    quantised,
    refuse_widths,
)

# Buffers that older releases wrote into checkpoints; they follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Placement:
    """In which precision weights are wanted, and where."""

    quant: str | None = None
    """A key of ``quantise.DTYPES``; None keeps the checkpoint's."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


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
    model_class: type[PreTrainedModel], config: Any, folder: Path, placement: Placement
) -> Any:
    """The model in eval mode.

    Raises:
        XsdError: a file cannot be read, its tensors are not exactly the model's, or memory is
            short.
    """
    quant, device = placement.quant, placement.device
    shape = _empty(model_class, config)
    check_memory(shape, quant, device)
    is_rounded = quant is not None and quant in QUANTISED
    if quant is not None and is_rounded:
        refuse_widths(shape, quant, device)
    straight = device.type != "cpu" and not is_rounded
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                # What is to be rounded stays mapped from its files until then.
                dtype="auto" if is_rounded or quant is None else DTYPES[quant],
                device_map={"": device} if straight else None,
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
    if quant is not None and is_rounded:
        quantise(model.get_decoder(), quant, device)
        _move(model, DTYPES[quant], device)
    return model.eval()


def draw_weights(model_class: type[PreTrainedModel], config: Any, placement: Placement) -> Any:
    """The model with random weights, made where they are to lie; the same ones every time.

    A tensor depends on its name, the kind of device and the precision alone. Products keep the
    size of what goes in, so that numbers stay in range at any depth.

    Raises:
        XsdError: memory is short.
    """
    quant, device = placement.quant or "fp32", placement.device
    model = _empty(model_class, config)
    check_memory(model, quant, device)
    refuse_widths(model, quant, device)
    rounded = _rounded_paths(model) if quant in QUANTISED else set()
    library = load_library(quant) if rounded else None
    for path in [path for path, _ in model.named_modules()]:
        module = model.get_submodule(path)
        for name, blank in list(module.named_parameters(recurse=False)):
            tensor = _draw(f"{path}.{name}", blank.shape, DTYPES[quant], device)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        if path in rounded:
            model.set_submodule(path, quantised(library, module, quant, device))
    _move(model, DTYPES[quant], device)
    return model.eval()


def check_memory(model: Any, quant: str | None, device: torch.device) -> None:
    """Refuse what cannot fit, before minutes are spent on loading it.

    Raises:
        XsdError: the weights alone need more than the device has free.
    """
    needed = num_bytes(model, model.get_decoder(), quant or "fp16")
    free = free_bytes(device)
    if needed <= free:
        return
    small = num_bytes(model, model.get_decoder(), "4bit")
    raise XsdError(
        f"{type(model).__name__} needs {needed / _GIB:.1f} GiB in {quant or 'its precision'}, "
        f"{device} has {free / _GIB:.1f} GiB free; say --quant 4bit ({small / _GIB:.1f} GiB), "
        "or choose another --device or --device_map"
    )


def _empty(model_class: type[PreTrainedModel], config: Any) -> Any:
    """The model's shape; its buffers follow from the configuration and are real."""
    with init_empty_weights(include_buffers=False):
        return model_class(config)


def _rounded_paths(model: Any) -> set[str]:
    layers = model.get_decoder().layers
    (at,) = (path for path, module in model.named_modules() if module is layers)
    return {f"{at}.{path}" for path in plain_linears(layers)}


def _draw(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if len(shape) < 2:
        value = 0.0 if name.endswith("bias") else 1.0
        return torch.full(shape, value, dtype=dtype, device=device)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    generator = torch.Generator(device).manual_seed(seed)
    fan_in = shape[1:].numel()
    tensor = torch.empty(shape, dtype=dtype, device=device)
    return tensor.normal_(0, fan_in**-0.5, generator=generator)


def _move(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Parameters to a dtype and device; rounded ones are integers and in place, buffers precise."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


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
    make_folder(folder)
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
