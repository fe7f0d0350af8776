"""``xsd dashboard``: the tracked runs in a browser, live."""

from __future__ import annotations

from dataclasses import dataclass

from xsd.errors import XsdError

NAME = "dashboard"
HELP = "Serve the live dashboard of the tracking store (MLFLOW_TRACKING_URI)."


@dataclass(frozen=True)
class Config:
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets everybody in who reaches this machine."""
    port: int = 8050
    """Port to listen at; 0: any that is free."""
    ui: str | None = None
    """Address of the MLflow UI that runs are linked to; null: the tracking server, or
    http://127.0.0.1:5000 for a store that is a file."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise XsdError(f"port={self.port}: must be between 0 and 65535")


def run(config: Config) -> None:
    from dashboards.app import serve

    serve(config.host, config.port, config.ui)
