"""Which device work runs on."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from xsd.errors import XsdError
from xsd.pairs.config import PairConfig

ROLES = ("drafter", "verifier")


def choose_device(name: str) -> torch.device:
    """``auto``: the first GPU, else the CPU; in a launched process, its own GPU, by number.

    Raises:
        XsdError: not a device, or not of this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise XsdError(f"--device {name}: not a device; say cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise XsdError(f"--device {name}: this machine has {torch.cuda.device_count()} such GPUs")
    if device.type == "cuda" and ":" not in name and torch.cuda.is_initialized():
        # A launcher sets the current GPU of one thread; others would take the first.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_devices(config: PairConfig) -> dict[str, torch.device]:
    """Of each half: ``--device_map``'s, else ``--device``.

    Raises:
        XsdError: a map of anything but the two roles, or a device that is not to be had.
    """
    names = dict.fromkeys(ROLES, config.device)
    for item in filter(None, (config.device_map or "").split(",")):
        role, equals, name = item.strip().partition("=")
        if role not in names or not equals:
            raise XsdError(
                f"--device_map {config.device_map}: {item.strip()!r} is not role=device; "
                "say drafter=cuda:1,verifier=cuda:0"
            )
        names[role] = name
    return {role: choose_device(name) for role, name in names.items()}


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def to_device(
    numbers: Sequence[object], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers, or lists of them, as a tensor; a GPU fetches them by itself and nobody waits."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
