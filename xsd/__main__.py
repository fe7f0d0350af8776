"""``python -m xsd``: the console script, where that is not on PATH."""

from xsd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
