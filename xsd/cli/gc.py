"""``xsd gc``: stale runs are closed, and what nothing refers to need not be kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xsd.errors import XsdError

NAME = "gc"
HELP = "List or remove what nothing refers to; close stale runs; show disk use."


@dataclass(frozen=True)
class Config:
    older_than_days: float = 7.0
    """What ended, or was last written, less long ago is kept."""
    silent_hours: float = 24.0
    """A RUNNING run of another host is stale after so long without a metric."""
    outputs: Path = Path("outputs")
    """Where stages keep their work folders."""
    usage: bool = False
    """Show what stages and runs weigh instead."""
    apply: bool = False
    """Do it; without it, only list what would be done."""

    def __post_init__(self) -> None:
        if self.older_than_days < 0 or self.silent_hours < 0:
            raise XsdError("--older_than_days, --silent_hours: not below 0")
        if self.usage and self.apply:
            raise XsdError("--usage removes nothing; leave --apply out")


def run(config: Config) -> None:
    from xsd.tracking import store

    if config.usage:
        _usage()
        return
    with store.lock("gc"):
        _collect(config)


def _collect(config: Config) -> None:
    from xsd.tracking import clean

    stale = clean.stale(config.silent_hours)
    for run_id, name, why in stale:
        print(f"stale      {run_id} {name}  {why}")
        if config.apply:
            clean.close(run_id)
    num_bytes = 0
    items = clean.find(config.older_than_days, config.outputs)
    for item in items:
        weight = item.num_bytes
        num_bytes += weight
        print(f"{item.kind:<11}{item.name}  {item.why}  {weight / 2**20:.1f} MiB")
        if config.apply:
            clean.remove(item)
    done = "closed, removed" if config.apply else "to close, to remove (--apply does it)"
    print(f"{len(stale)} stale runs, {len(items)} items, {num_bytes / 2**20:.1f} MiB: {done}")


def _usage() -> None:
    from xsd.tracking import query

    runs = query.runs(only_finished=False)
    runs = runs[runs["stage"] != ""].assign(bytes=lambda found: query.num_bytes(found))
    print(f"{'stage':<12}{'runs':>6}{'MiB':>12}")
    for stage, rows in runs.groupby("stage"):
        print(f"{stage:<12}{len(rows):>6}{rows['bytes'].sum() / 2**20:>12.1f}")
    print("\nlargest runs (a file that runs share by a hard link counts for each):")
    for row in runs.nlargest(20, "bytes").to_dict("records"):
        print(f"{row['bytes'] / 2**20:>10.1f} MiB  {row['run_id']}  {row['name']}")
    unknown = int(runs["bytes"].isna().sum())
    if unknown:
        print(f"{unknown} runs do not say what they weigh")
