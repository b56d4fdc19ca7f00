"""docker-compose.yml and Dockerfile, without a Docker engine: valid, and in step with the rest of the project."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from accrual.cli import app
from accrual.config import load_config
from accrual.kafka_jars import kafka_version, locked_jars

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def stages(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that run our own image."""
    return {name: service for name, service in compose["services"].items() if "build" in service}


@pytest.fixture(scope="module")
def specification() -> Validator:
    """The Compose specification's own schema, as `check-jsonschema` carries it; its command line is not needed."""
    carried = distribution("check-jsonschema").locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    schema = json.loads(Path(str(carried)).read_text(encoding="utf-8"))
    return validator_for(schema)(schema)


def test_compose_file_follows_the_specification(compose: dict[str, Any], specification: Validator) -> None:
    assert [error.message for error in specification.iter_errors(compose)] == []

    misspelt = compose | {"services": {"kafka": {"image": "apache/kafka", "healthchek": {}}}}
    assert any("healthchek" in error.message for error in specification.iter_errors(misspelt))


def test_services_refer_to_what_the_file_declares(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in compose["services"], f"{name} depends on {needed}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][needed], f"{needed} has no health to wait for"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"], f"{name} mounts {volume}"


def test_production_shape(stages: dict[str, dict[str, Any]], compose: dict[str, Any]) -> None:
    assert set(stages) == {"topics", "join", "monitor", "sink", "trainer"}
    assert set(compose["services"]) - set(stages) == {"kafka", "postgres", "s3"}
    assert stages["sink"].get("deploy", {}).get("replicas", 1) == 1, "the lake has one writer"


def test_every_stage_is_a_command_of_the_image(stages: dict[str, dict[str, Any]]) -> None:
    commands: Any = typer.main.get_command(app)
    for name, stage in stages.items():
        found = commands
        for word in stage["command"]:
            if word.startswith("-"):
                break  # the options of the command found so far
            assert word in getattr(found, "commands", {}), f"{name}: there is no `accrual {' '.join(stage['command'])}`"
            found = found.commands[word]


def test_settings_are_ones_accrual_knows(stages: dict[str, dict[str, Any]]) -> None:
    for stage in stages.values():
        config = load_config(environ=stage["environment"])
        assert config.kafka.bootstrap_servers == "kafka:9092"
        assert config.lake_catalog.startswith("postgres:")
        assert config.lake_data.startswith("s3://")


def test_images_are_pinned(compose: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
    images = {name: service["image"] for name, service in compose["services"].items()}
    assert images["kafka"].endswith(f":{kafka_version(locked_jars())}"), "development and production run one Kafka"
    assert {images[name] for name in stages} == {f"accrual:{PROJECT['version']}"}
    assert not [image for image in images.values() if ":" not in image or image.endswith(":latest")]


def test_dockerfile_builds_the_project_that_pyproject_describes() -> None:
    [python] = re.findall(r"^FROM python:(\d+\.\d+)", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]

    installed = set(re.findall(r"--extra (\w+)", DOCKERFILE))
    assert installed == set(PROJECT["optional-dependencies"]) - {"dev", "broker"}
    installs = [line for line in DOCKERFILE.replace("\\\n", "").splitlines() if "pip install" in line]
    assert all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs)

    [entrypoint] = re.findall(r'^ENTRYPOINT \["(\w+)"\]', DOCKERFILE, re.MULTILINE)
    assert entrypoint in PROJECT["scripts"]


def test_dockerfile_copies_what_the_ignore_file_lets_through() -> None:
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert copied == set(re.findall(r"^!(.+)$", ignore, re.MULTILINE))
    assert not [name for name in copied if not (ROOT / name).exists()]
    assert {"accrual", "streams", "consumers", "trainer", "schemas"} <= copied
