"""``python -m dashboards`` is ``xsd dashboard``."""

from __future__ import annotations

from xsd.cli import main

if __name__ == "__main__":
    raise SystemExit(main(command="dashboard"))
