"""Plugins that MLflow loads when it is imported, so that ``mlflow run .`` works as it stands.

1. MLproject names a conda environment, and MLflow's choice of conda is hard-coded. Where conda is
   missing, xsd's own project runs in the environment of the launcher instead, and says so.
   ``XSD_ENV_MANAGER`` (local, conda, virtualenv, uv) overrides; ``--env-manager`` wins over both.
2. Runs of the project land in the experiment of their pair, not in "Default".
3. ``-P name=value`` with a credential is refused before MLflow keeps and shows it.

Only the project named ``xsd`` is touched. MLflow imports this module halfway through its own
import: nothing of MLflow may be imported at the top. The backend's ``run`` is not public; if it
changes, MLflow's own behaviour, and message, remain.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

_BACKEND: Final = "mlflow.projects.backend.local"


class RunContext:
    """A run-context provider that provides nothing: its entry point gets this module loaded."""

    def in_context(self) -> bool:
        return False

    def tags(self) -> dict[str, str]:
        return {}


class DefaultExperiment:
    """The experiment ``xsd/<pair>`` for ``mlflow run`` on this project."""

    def in_context(self) -> bool:
        is_launcher = Path(sys.argv[0]).stem == "mlflow" and "run" in sys.argv[1:3]
        return is_launcher and _is_ours(".")

    def get_experiment_id(self) -> str:
        from xsd.tracking import store

        return store.experiment_id(_pair(sys.argv))


def _pair(argv: Sequence[str]) -> str:
    """The value of ``-P pair=...``."""
    pairs = [word.partition("=")[2] for word in argv if word.startswith(("pair=", "-Ppair="))]
    return pairs[-1] if pairs and pairs[-1] != "null" else "tiny"


def _is_ours(project: str) -> bool:
    path = Path(project.removeprefix("file://")) / "MLproject"
    return path.is_file() and "name: xsd" in path.read_text(encoding="utf-8").splitlines()


def choose_manager() -> str | None:
    """The environment manager to use where none was asked for; None: leave it to MLflow."""
    if override := os.environ.get("XSD_ENV_MANAGER"):
        return override
    has_conda = shutil.which("conda") or {"CONDA_EXE", "MLFLOW_CONDA_HOME"} & set(os.environ)
    return None if has_conda else "local"


def refuse_credentials(params: Mapping[str, object]) -> None:
    """MLflow would keep them as params, which nobody can change, before a stage starts."""
    from mlflow.exceptions import ExecutionException

    from xsd.tracking.credentials import redactor

    hide = redactor()
    held = sorted(name for name, value in params.items() if hide(str(value)) != str(value))
    if held:
        raise ExecutionException(
            f"a credential in -P {', '.join(held)}: mlflow would keep it; give it by the"
            " environment instead (docs/lineage.md)"
        )


def patch(backend: ModuleType) -> None:
    """Let ``LocalBackend.run`` choose the manager for our project, and refuse credentials."""
    original = getattr(getattr(backend, "LocalBackend", None), "run", None)
    if original is None:
        return
    from mlflow.projects.utils import PROJECT_ENV_MANAGER as key  # noqa: N811

    def run(self: Any, project_uri: str, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(project_uri):
            given = inspect.signature(original).bind(self, project_uri, *args, **kwargs)
            refuse_credentials(given.arguments.get("params") or {})
        settings = kwargs.get("backend_config") or next(
            (arg for arg in args if isinstance(arg, dict) and key in arg), {}
        )
        if settings.get(key, "given") is None and _is_ours(project_uri):
            settings[key] = choose_manager()
            if settings[key] == "local":
                print("xsd: no conda here; running in the current environment", file=sys.stderr)
        if settings.get(key) == "local" and _is_ours(project_uri):
            # MLproject says "python": let it be the one that runs this.
            os.environ["PATH"] = os.pathsep.join([sys.prefix + "/bin", os.environ.get("PATH", "")])
        return original(self, project_uri, *args, **kwargs)

    backend.LocalBackend.run = run


class _PatchAfterImport(MetaPathFinder):
    """Patches the backend module when it is imported, later than this one."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _BACKEND:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingLoader(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        patch(module)


if _BACKEND in sys.modules:
    patch(sys.modules[_BACKEND])
else:
    sys.meta_path.insert(0, _PatchAfterImport())
