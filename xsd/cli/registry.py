"""``xsd registry``: the registered adapters, their champions, and moving those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xsd.config import Level
from xsd.errors import XsdError

HELP = "list | show MODEL | promote RUN | rollback MODEL: adapters and their champions"
POSITIONAL = ("action", "target")
_SHOWN = (
    *("accept_length", "metric", "conditioning", "loss", "quant", "dataset_digest", "val_digest"),
    *("sha256", "source_run", "rolled_back"),
)


@dataclass(frozen=True)
class Config:
    action: Literal["list", "show", "promote", "rollback"] = "list"
    """list all versions; show one model's with its refused candidates; promote a training; rollback
    to the champion before."""
    target: str | None = None
    """A level (L4, L4-free) or model name; to promote: a training or sweep, as runs:/<id>."""
    pair: str | None = None
    """Pair of the level; null: tiny, and all of them for list."""


def run(config: Config) -> None:
    if config.action == "list":
        _list(config)
    elif config.target is None:
        raise XsdError(f"xsd registry {config.action}: of what? see xsd registry --help")
    elif config.action == "show":
        _show(_model(config))
    elif config.action == "promote":
        from xsd.commands import promote

        uri = config.target if ":" in config.target else f"runs:/{config.target}"
        promote.run(promote.Config(candidate=uri, pair=config.pair or "tiny"))
    else:
        _rollback(config)


def _list(config: Config) -> None:
    from xsd.tracking import registry

    versions = registry.versions(config.pair)
    if not versions:
        print("no adapter is registered yet; xsd promote does that")
        return
    print(f"{'model':<24}{'version':<9}{'alias':<19}{'metric':<20}{'value':<9}run")
    for version in versions:
        metric = version.tags.get("metric", "")
        value = version.tags.get("accept_length", "")
        print(
            f"{version.name:<24}{version.version:<9}{_aliases(version):<19}"
            f"{metric:<20}{value:<9}{version.run_id}"
        )


def _show(name: str) -> None:
    from xsd.tracking import registry

    found = [version for version in registry.versions() if version.name == name]
    if not found:
        raise XsdError(f"{name}: no such registered model; xsd registry lists them")
    for version in found:
        print(" ".join(filter(None, (f"{name} version {version.version}", _aliases(version)))))
        tags: Mapping[str, str] = version.tags
        for tag in _SHOWN:
            if tag in tags:
                print(f"  {tag:<16}{tags[tag]}")
    for run_id, candidate, reasons in registry.refusals(name):
        print(f"refused {candidate}: {reasons} (runs:/{run_id})")


def _rollback(config: Config) -> None:
    from xsd.tracking import registry

    outcome = registry.rollback(_model(config))
    print(f"{outcome.uri} is version {outcome.version} again")


def _model(config: Config) -> str:
    """Name of the registered model."""
    from xsd.tracking import registry

    target = str(config.target).removeprefix("models:/").partition("@")[0]
    if target.startswith("xsd-"):
        return target
    level, _, mode = target.replace(":", "-").partition("-")
    if mode not in ("", "free"):
        raise XsdError(f"{config.target}: give a level (L4, L4-free) or a model's name")
    name = "-".join(filter(None, (Level(level), mode)))
    return registry.model_name(config.pair or "tiny", name)


def _aliases(version: Any) -> str:
    return ", ".join(version.aliases)
