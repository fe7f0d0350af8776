"""The state of an unfinished training: one safetensors file, so it is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xsd.errors import XsdError
from xsd.files import atomic_path


@dataclass(frozen=True, slots=True)
class FitState:
    """How far training has come. Random numbers need no state: a step seeds its own."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps taken."""
    best: float | None = None
    """Best value of the selection metric so far."""
    epochs_since_best: int = 0
    num_batches: int = 0
    """Batches done of the epoch that is under way."""
    loss_sum: float = 0.0
    """Of their losses."""


def save_state(
    path: Path, progress: FitState, module: nn.Module, optimizer: torch.optim.Optimizer, key: str
) -> None:
    """Write atomically; ``key`` identifies the configuration that may go on from here."""
    write_state(path, asdict(progress), tensors_of(module, [optimizer]), key)


def load_state(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, key: str
) -> FitState:
    """Put weights and moments back in place.

    Raises:
        XsdError: unreadable, or written by another configuration.
    """
    progress, tensors = read_state(path, key)
    put_back(tensors, module, [optimizer])
    return FitState(**progress)


def write_state(
    path: Path,
    progress: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    key: str,
    *,
    durable: bool = True,
) -> None:
    """Write atomically; ``key`` identifies the configuration that may go on from here."""
    on_host = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {"progress": json.dumps(dict(progress)), "key": key}
    with atomic_path(path, durable=durable) as temporary:
        save_file(on_host, temporary, metadata=metadata)


def read_state(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Progress, and tensors by name.

    Raises:
        XsdError: unreadable, or written by another configuration.
    """
    remedy = "remove it to train from the start"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise XsdError(f"{path}: unreadable training state ({error}); {remedy}") from error
    if metadata.get("key") != key:
        raise XsdError(f"{path}: the training state of another configuration; {remedy}")
    return json.loads(metadata["progress"]), tensors


def tensors_of(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights, and what each optimizer keeps of each of its parameters."""
    # Detached: to copy a weight is no step of a graph, which would grow with every copy.
    named = module.named_parameters()
    found: dict[str, Tensor] = {f"weight.{name}": x.detach() for name, x in named}
    for number, optimizer in enumerate(optimizers):
        for index, kept in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{index}.{name}": x for name, x in kept.items()}
    return found


def put_back(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """The reverse; learning rates and the like stay those of the optimizers."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
    kept: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, x in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, index, what = rest.split(".")
            # A file's tensors lie anywhere; memory of its own is aligned, and sums go by that.
            kept[int(number)].setdefault(int(index), {})[what] = x.clone()
    for optimizer, state in zip(optimizers, kept, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
