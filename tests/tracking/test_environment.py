from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from mlflow.projects.utils import PROJECT_ENV_MANAGER

from xsd.tracking import environment, query, store


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that is called xsd and names a conda environment."""
    folder = tmp_path / "project"
    folder.mkdir()
    folder.joinpath("conda.yaml").write_text("dependencies: [python=3.11]\n")
    folder.joinpath("MLproject").write_text(
        "name: xsd\nconda_env: conda.yaml\nentry_points:\n  main:\n    parameters:\n"
        "      pair: {type: string, default: tiny}\n"
        "    command: \"python -c 'import xsd' {pair}\"\n"
    )
    return folder


@pytest.fixture
def backend() -> types.ModuleType:
    """A double of MLflow's local backend that returns the manager it was given."""
    module = types.ModuleType("backend")

    class LocalBackend:
        def run(self, project_uri: str, entry_point: str, backend_config: dict) -> str | None:
            return backend_config[PROJECT_ENV_MANAGER]

    module.LocalBackend = LocalBackend
    environment.patch(module)
    return module


@pytest.fixture(autouse=True)
def no_conda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    for name in ("CONDA_EXE", "MLFLOW_CONDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def chosen(backend: types.ModuleType, project: Path, asked: str | None = None) -> str | None:
    return backend.LocalBackend().run(str(project), "main", {PROJECT_ENV_MANAGER: asked})


def test_without_conda_it_runs_here_and_says_so(backend, project, capsys) -> None:
    assert chosen(backend, project) == "local"
    assert capsys.readouterr().err == "xsd: no conda here; running in the current environment\n"
    assert os.environ["PATH"].startswith(sys.prefix)


def test_with_conda_mlflow_decides(backend, project, monkeypatch) -> None:
    monkeypatch.setenv("CONDA_EXE", "conda")
    assert chosen(backend, project) is None


def test_the_variable_overrides_and_the_flag_wins(backend, project, monkeypatch) -> None:
    monkeypatch.setenv("XSD_ENV_MANAGER", "uv")
    assert chosen(backend, project) == "uv"
    assert chosen(backend, project, "virtualenv") == "virtualenv"


def test_other_projects_are_left_alone(backend, tmp_path) -> None:
    tmp_path.joinpath("MLproject").write_text("name: other\n")
    assert chosen(backend, tmp_path) is None


def test_a_changed_backend_is_left_alone() -> None:
    environment.patch(types.ModuleType("backend"))


def test_the_installed_mlflow_is_what_is_patched() -> None:
    import mlflow.projects.backend.local as installed

    assert installed.LocalBackend.run.__module__ == environment.__name__


def test_the_experiment_is_the_pairs(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    provider = environment.DefaultExperiment()
    monkeypatch.chdir(project)
    assert not provider.in_context()
    monkeypatch.setattr(sys, "argv", ["/bin/mlflow", "run", ".", "-P", "pair=real"])
    assert provider.in_context()
    assert environment._pair(sys.argv) == "real"
    assert environment._pair(["mlflow", "run", "."]) == "tiny"
    monkeypatch.chdir(project.parent)
    assert not provider.in_context()


@pytest.mark.slow
def test_mlflow_run_works_without_conda(tracking: Path, project: Path) -> None:
    tools = project.parent / "bin"
    tools.mkdir()
    for name in ("bash", "git"):
        tools.joinpath(name).symlink_to(f"/usr/bin/{name}")
    launcher = Path(sys.executable).parent / "mlflow"
    done = subprocess.run(
        [str(launcher), "run", "."],
        cwd=project,
        env=os.environ | {"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no conda here") == 1
    frame = query.runs(only_finished=False)
    assert frame["status"].tolist() == ["FINISHED"]
    (run_id,) = frame["run_id"]
    assert store.client().get_run(run_id).info.experiment_id == store.experiment_id("tiny")
