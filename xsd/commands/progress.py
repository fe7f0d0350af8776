"""Progress: a bar on a terminal, a line every few seconds where there is none.

Processes that work side by side would draw over each other's bars, so a worker writes lines.
"""

from __future__ import annotations

import sys
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS = 5.0


def progress(desc: str, total: int, unit: str, initial: int = 0) -> tqdm[Any]:
    """A tqdm bar; log files get whole lines."""
    from tqdm import tqdm

    if sys.stderr.isatty() and parent_process() is None:
        return tqdm(desc=desc, total=total, unit=unit, initial=initial)
    return tqdm(
        desc=desc,
        total=total,
        unit=unit,
        initial=initial,
        file=_Lines(),
        mininterval=_SECONDS,
        maxinterval=_SECONDS,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt} {postfix}",
    )


class _Lines:
    """A stream that ends what would be overwritten with a new line instead."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
