"""Which device work runs on."""

from __future__ import annotations

import torch

from xsd.errors import XsdError


def choose_device(name: str) -> torch.device:
    """``auto``: the first GPU, else the CPU.

    Raises:
        XsdError: not a device, or not of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise XsdError(f"--device {name}: not a device; say cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise XsdError(f"--device {name}: this machine has {torch.cuda.device_count()} such GPUs")
    return device
