"""``xsd import-run FOLDER``: what stages recorded where no MLflow was becomes runs here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HELP = "Log the records of stages that ran elsewhere (XSD_RECORDS) into MLflow."
POSITIONAL = ("folder",)


@dataclass(frozen=True)
class Config:
    folder: Path = Path("records")
    """The folder that XSD_RECORDS named there, or what of it was kept."""


def run(config: Config) -> None:
    from xsd.files import read_json
    from xsd.tracking import records
    from xsd.tracking.run import stage_run

    found = records.read_records(config.folder)
    (pair, *others) = dict.fromkeys(read_json(path / "run.json")["pair"] for path in found)
    values = {"folder": str(config.folder), "num_records": len(found), "others": ",".join(others)}
    with stage_run("import", pair, values, name=f"import {config.folder.name}") as parent:
        for path in found:
            run_id, absent = records.import_record(path, parent.run_id, parent.experiment_id)
            note = f", without {len(absent)} files" if absent else ""
            print(f"{path.name}: run {run_id}{note}")
    print(parent.link())
