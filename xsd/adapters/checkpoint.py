"""Adapters on disk: ``<name>.safetensors`` beside one ``config.json``; no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xsd.adapters.base import Adapter
from xsd.adapters.catalog import build, level
from xsd.adapters.config import AdapterConfig
from xsd.errors import XsdError
from xsd.files import atomic_path, read_json, sha256_file, write_json

CONFIG = "config.json"


def save(
    adapter: Adapter,
    folder: Path,
    *,
    name: str = "best_model",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the weights, then the configuration that vouches for them; return the weights' path.

    ``extra`` (pair, conditioning, training configuration, ...) is kept under its own key. Several
    names of one adapter may share a folder.
    """
    path = folder / f"{name}.safetensors"
    adapter_config = asdict(adapter.config)
    tensors = {key: x.detach().cpu().contiguous() for key, x in adapter.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    digests: dict[str, str] = {}
    if (folder / CONFIG).exists():
        before = read_json(folder / CONFIG)
        if isinstance(before, dict) and before.get("adapter") == adapter_config:
            digests = dict(before.get("sha256", {}))
    write_json(
        folder / CONFIG,
        {
            "adapter": adapter_config,
            "num_parameters": sum(x.numel() for x in tensors.values()),
            "sha256": {**digests, name: sha256_file(path)},
            "extra": dict(extra or {}),
        },
    )
    return path


def load(
    path: Path,
    *,
    expect_level: str | int | None = None,
    expect_widths: tuple[int, int] | None = None,
) -> tuple[Adapter, dict[str, Any]]:
    """Load a checkpoint folder (its ``best_model``) or a weights file, verified, in eval mode.

    Returns the adapter, on the CPU, and the whole ``config.json``. ``expect_widths`` is
    (d_drafter, d_verifier) of the pair it is to serve.

    Raises:
        XsdError: missing or unreadable files, altered or non-finite weights, another level, other
            widths.
    """
    weights = path if path.suffix == ".safetensors" else path / "best_model.safetensors"
    if not weights.is_file():
        raise XsdError(f"{weights}: no such checkpoint; train one or check the path")
    about = weights.parent / CONFIG
    if not about.is_file():
        raise XsdError(f"{weights}: there is no {CONFIG} beside it; keep the two files together")
    config = read_json(about)
    adapter_config = _adapter_config(config, about)
    _check_expected(adapter_config, weights, expect_level, expect_widths)
    if config.get("sha256", {}).get(weights.stem) != sha256_file(weights):
        raise XsdError(f"{weights}: sha256 differs from config.json; the file was altered")
    try:
        adapter = build(adapter_config)
        adapter.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise XsdError(f"{weights}: does not fit its config.json ({first})") from error
    if not all(bool(torch.isfinite(x).all()) for x in adapter.state_dict().values()):
        raise XsdError(f"{weights}: holds weights that are not finite; train it again")
    return adapter.eval(), config


def _adapter_config(config: Any, path: Path) -> AdapterConfig:
    try:
        return AdapterConfig(**config["adapter"])
    except (TypeError, KeyError) as error:
        raise XsdError(f"{path}: is not an adapter's configuration ({error})") from error


def _check_expected(
    config: AdapterConfig,
    path: Path,
    expect_level: str | int | None,
    expect_widths: tuple[int, int] | None,
) -> None:
    if expect_level is not None and level(expect_level).name != config.level:
        wanted = level(expect_level).name
        raise XsdError(f"{path}: holds level {config.level}, wanted {wanted}; give another one")
    widths = (config.d_drafter, config.d_verifier)
    if expect_widths is not None and expect_widths != widths:
        raise XsdError(f"{path}: made for widths {widths}, not {expect_widths}; train it anew")
