"""``xsd lineage``: from a product back to the scenes it was made of, and on to its uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xsd.errors import XsdError

if TYPE_CHECKING:
    from xsd.tracking.lineage import Node

NAME = "lineage"
HELP = "Show what a run or model was made of, and what was made of it."
POSITIONAL = ("uri",)


@dataclass(frozen=True)
class Config:
    uri: str | None = None
    """First word: a run id or its first letters, runs:/<id>, models:/<name>@champion or a path;
    null: the newest benchmark."""
    direction: Literal["up", "down", "both"] = "up"
    """up: its sources; down: what used it."""
    pair: str = "tiny"
    """Pair whose newest benchmark is meant where no URI is given."""
    settings: bool = False
    """Show each run's resolved configuration too."""


def run(config: Config) -> None:
    from xsd.tracking import lineage, reuse

    uri = config.uri
    if uri is None:
        newest = reuse.newest_finished("benchmark", config.pair)
        if newest is None:
            raise XsdError(f"pair {config.pair!r} has no finished benchmark; name a run")
        uri = newest.uri
    uri = lineage.find(uri)
    above = lineage.up(uri)
    if above.note.startswith("missing"):
        if ":/" not in uri:
            raise XsdError(
                f"no run and no file is called {uri!r}; give a run id, runs:/<id>, models:/... or a"
                " path"
            )
        raise XsdError(f"{uri}: {above.note}")
    if config.direction != "down":
        print("made of:" if config.direction == "both" else "", end="")
        print("\n" * (config.direction == "both"), end="")
        _show(above, config.settings)
    if config.direction != "up":
        run_id = lineage.run_of(uri)
        if run_id is None:
            raise XsdError(f"{uri}: no run is known for it, so none is known to use it")
        if config.direction == "both":
            print("used by:")
        _show(lineage.down(run_id), config.settings)


def _show(root: Node, settings: bool) -> None:
    """Commit and environment are said where they change: most trees have one of each."""
    said: dict[str, str] = {}
    for depth, node in root.walk():
        indent = "  " * depth
        what = " ".join(filter(None, (node.stage, node.tags.get("level")))) or "file"
        role = f"{node.role}: " if node.role else ""
        note = f"  ({node.note})" if node.note else ""
        # A model's URI does not name its run.
        run = f"  run {node.run_id}" if node.run_id and node.run_id not in node.uri else ""
        print(f"{indent}{role}{what}  {node.uri}{run}{note}")
        if node.note == "shown above":
            continue
        for name, value in _details(node).items():
            if said.get(name) != value:
                print(f"{indent}    {name} {value}")
            said[name] = value
        if settings:
            for name, value in sorted(node.params.items()):
                if name.startswith("cfg."):
                    print(f"{indent}    {name.removeprefix('cfg.')} = {value}")


def _details(node: Node) -> dict[str, str]:
    tags = node.tags
    told = {
        "digest": tags.get("xsd.digest", "")[:12],
        "commit": tags.get("mlflow.source.git.commit", ""),
        "environment": tags.get("xsd.environment", ""),
    }
    return {name: value for name, value in told.items() if value}
