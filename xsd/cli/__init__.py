"""The command line: a table of verbs, and what is the same for all of them."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from xsd import __version__, config
from xsd.cli import seed_flags
from xsd.errors import XsdError

STAGES: Final = (
    *("scenes", "pretrain", "lm_head", "extract", "train", "evaluate", "two_phase"),
    *("benchmark", "sweep", "promote", "report", "main"),
)
"""The entry points of MLproject, in the order in which a tensor meets them."""

VERBS: Final = ("generate", "levels", "registry", "lineage", "gc", "import-run")
"""Plain commands that make no run."""

_REFUSALS: Final = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
"""What a disk refuses is the user's to mend; a file that we should have made is a defect."""

COMMANDS: Final = {
    **{stage: f"xsd.commands.{stage}" for stage in STAGES},
    **{verb: f"xsd.cli.{verb.replace('-', '_')}" for verb in VERBS},
}


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run one command; returns the exit code.

    A command module has ``HELP`` (one line), ``Config`` (a dataclass) and ``run(config)``.
    ``python -m xsd.commands.train`` is ``xsd train``: its tail calls ``main(command="train")``.

    Exit codes: 0; 2 for a user's mistake, told in one line; 130 after Ctrl-C; 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if command is None:
        if not words or words[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if words[0] == "--version":
            print(__version__)
            return 0
        command = words.pop(0)
    prog = f"xsd {command}"
    try:
        module = _module(command)
        positional = getattr(module, "POSITIONAL", None)
        if positional and words and not words[0].startswith("-"):
            words.insert(0, f"--{positional}")
        words, notes = seed_flags.translate(command, words)
        for note in notes:
            print(f"{prog}: {note}", file=sys.stderr)
        settings = config.parse(
            module.Config,
            words,
            prog=prog,
            description=module.HELP,
            epilog=seed_flags.epilog(command),
            sections=section_class,
        )
        module.run(settings)
    except XsdError as error:
        return _refuse(prog, str(error))
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return _refuse(prog, f"{error.filename or 'disk'}: {error.strerror}; choose another place")
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _refuse(prog: str, message: str) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _module(command: str) -> ModuleType:
    if command not in COMMANDS:
        raise XsdError(f"unknown command; choose one of {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[command])


def section_class(stage: str) -> type | None:
    if stage not in STAGES:
        return None
    found: type = _module(stage).Config
    return found


def _overview() -> str:
    lines = [
        "usage: xsd COMMAND [--config RECIPE.yaml] [--flag value ...]",
        "",
        "Speculative decoding across modalities. xsd COMMAND --help lists a command's flags.",
    ]
    for title, names in (("stages (mlflow run . -e NAME)", STAGES), ("other", VERBS)):
        lines += ["", f"{title}:"]
        lines += [f"  {name:<11}{_module(name).HELP}" for name in names]
    return "\n".join(lines)
