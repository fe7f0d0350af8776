"""Processes that promote at the same moment, against any store: each must beat who came before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from xsd.tracking import registry

_PROMOTE = """
import sys, time
from pathlib import Path
from xsd.tracking import registry
pair, mine, model, gate = sys.argv[1], float(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
num_rivals = int(sys.argv[5])

def better(incumbent):
    if incumbent is None:
        # All are here before any goes on: each has seen that there is no champion.
        (gate / str(mine)).touch()
        while len(list(gate.iterdir())) < num_rivals:
            time.sleep(0.01)
        return []
    theirs = float(incumbent.tags["accept_length"])
    return [] if mine > theirs else [f"{mine} does not beat {theirs}"]

outcome = registry.promote(pair, "L4", model, better, {"accept_length": mine})
print(outcome.promoted)
"""


def promote_at_once(
    pair: str, models: Mapping[float, str], gate: Path, folders: Sequence[Path]
) -> None:
    """A process for every model, and what must hold when all have ended.

    Args:
        models: accept length -> logged model of level L4; the pair has no champion yet.
        gate: a folder to be made, where they wait for each other.
        folders: where each runs; in folders of their own they share no lock but the store's.
    """
    gate.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROMOTE, pair, str(value), model, gate, str(len(models))],
            stdout=subprocess.PIPE, text=True, cwd=folder,
        )
        for (value, model), folder in zip(models.items(), folders, strict=True)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    won = {value for value, lines in zip(models, said, strict=True) if lines[-1:] == ["True"]}
    assert [process.returncode for process in processes] == [0] * len(models)
    assert max(models) in won, "the best is never refused"
    found = sorted(registry.versions(pair), key=lambda version: int(version.version))
    values = [float(version.tags["accept_length"]) for version in found]
    assert values == sorted(won), "each promotion beat the champion of its moment"
    holders = {alias: one.tags["accept_length"] for one in found for alias in one.aliases}
    newest = [registry.CHAMPION, registry.PREVIOUS]
    assert holders == dict(zip(newest, map(str, reversed(values)), strict=False))
