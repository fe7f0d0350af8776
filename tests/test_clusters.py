"""Stages on other machines, by MLflow's backends: what is submitted, and that it joins its run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes
import mlflow
import pytest
import yaml

from xsd.cli import STAGES, section_class
from xsd.config import parse
from xsd.tracking import store

ROOT = Path(__file__).parent.parent
SLURM, KUBERNETES = ROOT / "experiments/slurm", ROOT / "experiments/kubernetes"

# Runs the script at once, and hands over what it says it exports, as the real one would.
SBATCH = """#!/bin/bash
cp "$1" submitted.sh
names=$(sed -n 's/^#SBATCH --export=//p' "$1" | tr ',' ' ')
kept=()
for name in $names; do [ -n "${!name+set}" ] && kept+=("$name=${!name}"); done
env -i "${kept[@]}" bash "$1" > slurm-42.out 2>&1
echo "Submitted batch job 42"
"""
SQUEUE = "#!/bin/bash\necho JOBID,ST; echo 42,CD\n"
CONDA = '#!/bin/bash\n[ "$1 $2" = "env list" ] && echo \'{"envs": []}\'\nexit 0\n'


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with the commands of Slurm and conda, and none of their machines."""
    home = tmp_path / "conda"
    (home / "bin").mkdir(parents=True)
    (home / "etc/profile.d").mkdir(parents=True)
    (home / "etc/profile.d/conda.sh").write_text('conda() { echo "$@" > activated; }\n')
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "conda": CONDA}.items():
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)
    folders = [str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {"PATH": os.pathsep.join(folders), "MLFLOW_CONDA_HOME": str(home)}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_stage_goes_through_slurm(
    tracking: Path, tmp_path: Path, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow_slurm", reason="needs mlflow-slurm")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, work)
    given = json.loads((SLURM / "backend.json").read_text())
    # The sources of this checkout, whichever are installed.
    given["exports"].append("PYTHONPATH")
    (work / "backend.json").write_text(json.dumps(given))
    few = {"num_train": 1, "num_val": 1, "num_test": 1, "clips_per_recording": 1, "size": 64}
    params = [word for name, value in few.items() for word in ("-P", f"{name}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", ".", "-e", "scenes", *params]
    command += ["--backend", "slurm", "--backend-config", "backend.json"]
    subprocess.run(command, cwd=work, env=cluster, check=True, capture_output=True)
    script = (work / "submitted.sh").read_text()
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    assert "#SBATCH --time=12:00:00\n" in script
    assert "python -m xsd.commands.scenes" in script and "--num_train 1" in script
    assert not re.search("PASSWORD=|TOKEN=|KEY=", script), "names are exported, never values"
    assert (work / "activated").read_text().startswith("activate mlflow-")
    [run] = store.client().search_runs(store.experiment_ids())
    assert run.info.status == "FINISHED" and run.data.tags["stage"] == "scenes"
    assert run.data.tags["mlflow.project.backend"] == "slurm"
    assert run.data.metrics["num_train"] == 1, (work / "slurm-42.out").read_text()


def test_a_stage_is_a_kubernetes_job(
    tracking: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow's own code, from project to job; images and the cluster's API are stood in for."""
    sent: list[dict[str, Any]] = []
    image = SimpleNamespace(id="sha256:1", tags=["registry.example.org/xsd:0.1.0"])
    projects = "mlflow.projects"
    for name, value in {
        "docker.validate_docker_installation": lambda: None,
        "docker.build_docker_image": lambda **_: image,
        "kubernetes.push_image_to_registry": lambda tag: "sha256:2",
        "kubernetes._load_kube_context": lambda context=None: None,
    }.items():
        monkeypatch.setattr(f"{projects}.{name}", value)
    api = kubernetes.client.BatchV1Api
    monkeypatch.setattr(
        api, "create_namespaced_job", lambda self, namespace, body, pretty: sent.append(body)
    )
    monkeypatch.setenv("KUBE_MLFLOW_TRACKING_URI", "http://mlflow.example.org:5000")
    monkeypatch.chdir(ROOT)
    submitted = mlflow.projects.run(
        str(KUBERNETES),
        entry_point="train",
        parameters={"level": "E3", "config": "experiments/tiny.yaml"},
        backend="kubernetes",
        backend_config=str(KUBERNETES / "backend.json"),
        experiment_id=store.experiment_id("tiny"),
        synchronous=False,
    )
    [job] = sent
    # The API's own model of a job takes it, with every field known.
    api_client = kubernetes.client.ApiClient()
    read = api_client.deserialize(json.dumps(job), "V1Job", "application/json")
    assert read.metadata.namespace == "xsd" and read.metadata.name.startswith("xsd-")
    [container] = read.spec.template.spec.containers
    assert container.image == "registry.example.org/xsd:0.1.0@sha256:2"
    words = [word.strip("'") for word in container.command]
    assert words[:2] == ["xsd", "train"]
    config = parse(section_class("train"), words[2:], prog="xsd train")  # type: ignore[type-var, arg-type]
    assert config.level == "E3"
    variables = {variable.name: variable.value for variable in container.env}
    assert variables["MLFLOW_RUN_ID"] == submitted.run_id
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow.example.org:5000"
    assert "{replaced}" not in json.dumps(job)
    known = api_client.sanitize_for_serialization(read)
    template = yaml.safe_load((KUBERNETES / "job.yaml").read_text())
    assert _keys(template) <= _keys(known), "a key that Kubernetes does not know"


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


def test_the_containers_project_has_every_stage() -> None:
    entries = yaml.safe_load((KUBERNETES / "MLproject").read_text())["entry_points"]
    assert {name: entry["command"] for name, entry in entries.items()} == {
        name: f"xsd {name}" for name in STAGES
    }


def test_the_image_is_built_from_files_that_exist() -> None:
    lines = (KUBERNETES / "Dockerfile").read_text().splitlines()
    copies = [shlex.split(line)[1:-1] for line in lines if line.startswith("COPY")]
    copied = {name for names in copies for name in names}
    assert all((ROOT / name).exists() for name in copied)
    # What the package's build needs beside its own sources.
    assert {"xsd", "dashboards", "pyproject.toml", "constraints.txt"} <= copied
