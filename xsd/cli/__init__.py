"""The command line: a table of verbs, and what is the same for all of them."""

from __future__ import annotations

import errno
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from xsd import __version__, config
from xsd.cli import seed_flags
from xsd.errors import XsdError
from xsd.tracking.credentials import redacted

STAGES: Final = (
    *("scenes", "pretrain", "lm_head", "extract", "train", "evaluate", "two_phase"),
    *("benchmark", "sweep", "promote", "report", "main"),
)
"""The entry points of MLproject, in the order in which a tensor meets them."""

VERBS: Final = (
    *("generate", "levels", "registry", "lineage", "store", "deliver", "dashboard", "gc"),
    "import-run",
)
"""Plain commands that make no run."""

_REFUSALS: Final = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
"""What a disk refuses is the user's to mend; a file that we should have made is a defect."""

_OUTAGE: Final = (
    "the tracking server went away; what it missed is kept and sent with the next run,"
    " so run this again when it is back"
)

COMMANDS: Final = {
    **{stage: f"xsd.commands.{stage}" for stage in STAGES},
    **{verb: f"xsd.cli.{verb.replace('-', '_')}" for verb in VERBS},
}


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run one command; returns the exit code.

    A command module has ``HELP`` (one line), ``Config`` (a dataclass) and ``run(config)``; perhaps
    ``POSITIONAL``, the fields that leading words without a flag are for.
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
        words, notes = spelled(command, words)
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
    except Exception as error:
        if not _is_outage(error):
            raise
        return _refuse(prog, _OUTAGE)
    return 0


def spelled(command: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Published names and plain words as our flags; and notes for the user.

    Raises:
        XsdError: they cannot be.
    """
    return seed_flags.translate(command, _named(_module(command), list(words)))


def _named(module: ModuleType, words: list[str]) -> list[str]:
    """Give leading words the names that the module has for them: ``show L4``.

    A last name that ends in ``...`` takes all the words that are left, as a list.
    """
    *names, last = getattr(module, "POSITIONAL", None) or ("",)
    if not last.endswith("..."):
        names, last = [*names, last] if last else names, ""
    plain = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    count = min(plain, len(names))
    given = zip(names, words[:count], strict=False)
    found = [text for name, word in given for text in (f"--{name}", word)]
    if last and plain > count:
        found += [f"--{last.removesuffix('...')}", json.dumps(words[count:plain])]
        count = plain
    return found + words[count:]


def _refuse(prog: str, message: str) -> int:
    line = redacted(" ".join(message.split()))
    print(f"{prog}: error: {line}", file=sys.stderr)
    return 2


def _is_outage(error: BaseException) -> bool:
    if "mlflow" not in sys.modules:
        return False
    from xsd.tracking import store

    return store.is_outage(error)


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
