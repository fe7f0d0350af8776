"""``xsd gc``: what failed or was killed need not be kept."""

from __future__ import annotations

from dataclasses import dataclass

NAME = "gc"
HELP = "Delete failed and killed runs, with their files."


@dataclass(frozen=True)
class Config:
    older_than_days: float = 7.0
    """Runs that ended less long ago are kept."""
    apply: bool = False
    """Delete; without it, only list what would be."""


def run(config: Config) -> None:
    from xsd.tracking import clean

    found = clean.unfinished(config.older_than_days)
    for run_id, name, status in found:
        print(f"{run_id}  {status:<8}{name}")
        if config.apply:
            clean.delete(run_id)
    verb = "deleted" if config.apply else "to delete (--apply does it)"
    print(f"{len(found)} runs {verb}")
