from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from xsd import config
from xsd.cli import STAGES
from xsd.tracking import records, store
from xsd.tracking.credentials import redacted
from xsd.tracking.run import stage_run

PASSWORD, KEY, TOKEN = "hunter2-pw", "AKIAsecretKeyValue", "ghp_0123456789abcdef0123"
SIGNED = f"https://b.s3.amazonaws.com/x?X-Amz-Credential={KEY}%2F1&X-Amz-Signature={TOKEN}&v=1"
LEAKS = (
    f"postgresql://u:{PASSWORD}@h/d",
    f"s3://id:{PASSWORD}@bucket/key",
    f"https://{TOKEN}@host/repo.git",
    f"https://a.blob.core.windows.net/c?sv=1&sig={TOKEN}",
    f"postgresql://h/d?user=u&password={PASSWORD}",
    SIGNED,
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3-secret-in-env")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tracking-pw-in-env")


def is_clean(text: str) -> bool:
    secret = (PASSWORD, KEY, TOKEN, "s3-secret-in-env", "tracking-pw-in-env")
    return not any(one in text for one in secret)


@pytest.mark.parametrize("text", LEAKS)
def test_urls_are_hidden_and_still_say_where(text: str) -> None:
    shown = redacted(f"reads {text} now")
    assert is_clean(shown) and "***" in shown
    assert shown.startswith(f"reads {text.partition('://')[0]}://") and shown.endswith(" now")


@pytest.mark.parametrize("text", LEAKS)
def test_a_path_made_of_a_url_is_hidden_too(text: str) -> None:
    assert is_clean(redacted(str(Path(text))))


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/key", "http://127.0.0.1:5000", "sqlite:////a/b@c.db", "file:///a"),
        *("file:/a/b", "outputs/a:/b@c", "C:/Users/me@work/adapters:new"),
        *("ssh://me@h/p", "https://h/x?v=1&design=2", "accept@0.90"),
        "models:/xsd-tiny-L4@champion",
        "models:/xsd-eventgpt-video-llava-L4-free@champion",
    ],
)
def test_what_holds_none_is_left_as_it_is(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_keeps_a_credential(
    stage: str, tracking: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every parameter of every stage holds one, as do tags, datasets and the error."""
    names = config.resolved(importlib.import_module(f"xsd.commands.{stage}").Config())
    given = {name: LEAKS[n % len(LEAKS)] + " s3-secret-in-env" for n, name in enumerate(names)}
    with pytest.raises(RuntimeError), stage_run(stage, "tiny", given, tags={"note": SIGNED}) as run:
        run.dataset("scenes", "d", SIGNED, "train")
        run.say(f"made from {SIGNED}")
        raise RuntimeError(f"cannot read {' '.join(LEAKS)}")
    data = store.client().get_run(run.run_id).data
    assert len([name for name in data.params if name.startswith("cfg.")]) == len(names)
    assert "***" in data.tags["note"] and "***" in data.tags["xsd.error"]
    with records.record(tmp_path / "r", stage, "tiny", given, {}, {"note": SIGNED}, "k") as noted:
        noted.dataset("scenes", "d", SIGNED, "train")
    for file in (file for root in (tracking, tmp_path) for file in root.rglob("*")):
        if file.is_file():
            assert is_clean(file.read_bytes().decode("latin-1")), file
    assert is_clean("".join(capfd.readouterr()))


def test_what_mlflow_run_kept_is_written_over_or_told(
    tracking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = store.client()
    command = f"python -m xsd train --data {LEAKS[1]}"
    launched = client.create_run(store.experiment_id("tiny"), tags={"mlflow.project.cmd": command})
    run_id = launched.info.run_id
    client.log_param(run_id, "data", LEAKS[1])
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with stage_run("train", "tiny", {}):
        pass
    assert is_clean(json.dumps(client.get_run(run_id).data.tags))
    error = capsys.readouterr().err
    assert "param data of run" in error and error.count("\n") == 1 and is_clean(error)


def test_the_way_to_the_ui_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri, shown in (
        ("sqlite:////a/b.db", "mlflow ui --backend-store-uri sqlite:////a/b.db"),
        (LEAKS[0], 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'),
        (f"http://me:{PASSWORD}@host:5000", "at http://me:***@host:5000"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert store.ui_command() == shown


# As from a shell, or without what xsd adds to the launcher: it is another machine's, say.
LAUNCHERS = {
    "mlflow": "",
    "bare": "from xsd.tracking import environment; environment.patch = lambda _: None\n",
}


def launch(launcher: str, folder: Path, *params: str) -> subprocess.CompletedProcess[str]:
    """``mlflow run`` of this project, for real."""
    code = LAUNCHERS[launcher] + "from mlflow.cli import cli; cli()"
    words = ["run", str(ROOT), "-e", "report", "--env-manager", "local"]
    words += [word for one in params for word in ("-P", one)]
    # The launcher starts the stage by whatever python comes first.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def lines_with(text: str, part: str) -> Sequence[str]:
    return [line for line in text.splitlines() if part in line]


def files(folder: Path) -> str:
    found = (file for file in folder.rglob("*") if file.is_file())
    return "".join(file.read_bytes().decode("latin-1") for file in found)


@pytest.mark.slow
def test_mlflow_run_refuses_a_credential_before_it_is_kept(tracking: Path, tmp_path: Path) -> None:
    done = launch("mlflow", tmp_path, f"runs={LEAKS[0]}", f"output_dir={LEAKS[1]}", "pair=tiny")
    assert done.returncode == 1
    [said] = lines_with(done.stderr, "credential")
    assert "-P output_dir, runs" in said and "by the environment" in said
    assert is_clean(done.stdout + done.stderr) and is_clean(files(tmp_path))
    assert store.client().search_runs(store.experiment_ids()) == []


@pytest.mark.slow
def test_what_a_bare_launcher_kept_is_told_in_one_line(tracking: Path, tmp_path: Path) -> None:
    """MLflow keeps the params, and shows its command line, before our code starts."""
    done = launch("bare", tmp_path, f"runs={LEAKS[0]}", f"output_dir={LEAKS[1]}")
    assert done.returncode == 1
    [run] = store.client().search_runs(store.experiment_ids())
    assert {name for name, value in run.data.params.items() if not is_clean(value)} == {
        "output_dir",
        "runs",
    }
    assert run.info.status == "FAILED" and "***" in run.data.params["cfg.output_dir"]
    assert is_clean(json.dumps(run.data.tags))
    [said] = lines_with(done.stderr, "kept a credential")
    assert f"param output_dir, runs of run {run.info.run_id}" in said and "delete" in said
    spoken = [line for line in done.stderr.splitlines() if "=== Running command" not in line]
    assert is_clean(done.stdout + "".join(spoken))
