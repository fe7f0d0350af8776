"""``xsd deliver``: send what runs wrote while their tracking server was away."""

from __future__ import annotations

from dataclasses import dataclass

HELP = "Send what runs wrote while the tracking server was away."


@dataclass(frozen=True)
class Config:
    """There is nothing to choose."""


def run(config: Config) -> None:
    from xsd.errors import XsdError
    from xsd.tracking import spool, store

    client = store.client()
    waiting = spool.pending()
    for run_id in waiting:
        if not spool.deliver(client, run_id):
            raise XsdError("the tracking server went away again; what is left stays kept")
    if not waiting:
        print("nothing is waiting for this tracking server")
