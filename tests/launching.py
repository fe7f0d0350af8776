"""``accelerate launch`` on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def launched(num_processes: int, *words: object) -> subprocess.Popen[str]:
    """``xsd`` in so many processes, in a session of their own.

    ``--multi_gpu`` is what makes the launcher start several, whatever they run on: told ``--cpu``,
    it starts one.
    """
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launch, *plain, "--num_processes", str(num_processes), "-m", "xsd"]
    return subprocess.Popen(
        [*command, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank."""
    [found] = [p for p in children(launcher.pid) if p.environ().get("RANK") == str(rank)]
    return found


def children(pid: int) -> list[psutil.Process]:
    """Live processes below one, which may itself be gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
