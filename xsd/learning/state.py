"""The state of an unfinished training: one safetensors file, so it is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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
    tensors = {name: x.detach().cpu().contiguous() for name, x in _tensors(module, optimizer)}
    metadata = {"progress": json.dumps(asdict(progress)), "key": key}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_state(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, key: str
) -> FitState:
    """Put weights and moments back in place.

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
    for parameter in module.parameters():
        # The moments must exist before they can be filled.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    with torch.no_grad():
        for name, x in _tensors(module, optimizer):
            x.copy_(tensors[name])
    return FitState(**json.loads(metadata["progress"]))


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"weight.{name}", parameter
        for moment, x in optimizer.state[parameter].items():
            yield f"{moment}.{name}", x
