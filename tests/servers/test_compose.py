"""The compose file says what docs/server.md promises; there is no Docker here to run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def test_its_services() -> None:
    assert set(SERVICES) == {"database", "store", "bucket", "mlflow"}
    assert {name for name, one in SERVICES.items() if "ports" in one} == {"mlflow"}
    needs = SERVICES["mlflow"]["depends_on"]
    assert needs["database"]["condition"] == "service_healthy"
    assert needs["bucket"]["condition"] == "service_completed_successfully"
    for service in SERVICES.values():
        for name in service.get("depends_on", {}):
            assert name in SERVICES


def test_the_server_proxies_artifacts_and_keeps_runs_in_postgresql() -> None:
    server = SERVICES["mlflow"]
    assert "--artifacts-destination s3://mlflow/artifacts" in server["command"]
    uri = server["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert uri.startswith("postgresql+psycopg2://") and "@database:5432/" in uri
    assert server["environment"]["MLFLOW_S3_ENDPOINT_URL"] == "http://store:9000"
    assert 'Bucket="mlflow"' in SERVICES["bucket"]["command"][-1]
    compile(SERVICES["bucket"]["command"][-1], "bucket", "exec")


def test_no_password_is_written_down_or_has_a_default() -> None:
    for variable in re.findall(r"\$\{(\w*PASSWORD\w*)([^}]*)\}", TEXT):
        assert variable[1] in ("", ":?set it in .env"), variable
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY", name):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), name


def test_data_outlive_their_containers() -> None:
    for name in ("database", "store"):
        [volume] = SERVICES[name]["volumes"]
        assert volume.partition(":")[0] in COMPOSE["volumes"]


@pytest.mark.parametrize("package", ["mlflow", "psycopg2-binary", "boto3"])
def test_versions_are_the_projects(package: str) -> None:
    assert f"{package}=={PINS[package]}" in TEXT


def test_images_are_pinned_and_the_port_is_closed_by_default() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert all(re.search(r":\d", image) for image in images)
    assert SERVICES["mlflow"]["ports"] == ["${XSD_ADDRESS:-127.0.0.1}:5000:5000"]


def test_the_page_names_every_variable() -> None:
    page = (ROOT / "docs/server.md").read_text()
    for name in set(re.findall(r"\$\{(\w+)", TEXT)):
        assert name in page, name
