"""``xsd lineage``: from a product back to the scenes it was made of."""

from __future__ import annotations

from dataclasses import dataclass

from xsd.errors import XsdError

NAME = "lineage"
HELP = "Walk from a run or model back to its sources."


@dataclass(frozen=True)
class Config:
    uri: str | None = None
    """A path, runs:/<id> or models:/<name>@champion; null: the newest benchmark."""
    pair: str = "tiny"
    """Pair whose newest benchmark is meant where no URI is given."""


def run(config: Config) -> None:
    from xsd.tracking import query, reuse

    uri = config.uri
    if uri is None:
        newest = reuse.newest_finished("benchmark", config.pair)
        if newest is None:
            raise XsdError(f"pair {config.pair!r} has no finished benchmark; give --uri")
        uri = newest.uri
    for row in query.lineage(uri).to_dict("records"):
        what = " ".join(filter(None, (row["stage"], row["level"]))) or "file"
        role = f"{row['role']}: " if row["role"] else ""
        detail = row["note"] or f"digest {row['digest']}"
        print(f"{'  ' * row['depth']}{role}{what}  {row['uri']}  {detail}")
