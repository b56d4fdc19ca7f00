"""Configuration: order of precedence, errors that name the setting, and what children inherit."""

from pathlib import Path

import pytest

from accrual.config import load_config
from accrual.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_then_file_then_environment_then_arguments(tmp_path: Path) -> None:
    assert load_config({}).kafka.bootstrap_servers == "127.0.0.1:9092"
    Path("accrual.toml").write_text('state = "here"\n[kafka]\nbootstrap_servers = "file:1"\n[topics]\npartitions = 8\n')
    assert load_config({}).kafka.bootstrap_servers == "file:1"
    env = {"ACCRUAL_KAFKA_BOOTSTRAP_SERVERS": "env:1", "ACCRUAL_TOPICS_PARTITIONS": "2"}
    config = load_config(env)
    assert (config.kafka.bootstrap_servers, config.topics.partitions) == ("env:1", 2)
    assert config.state_dir == tmp_path / "here"
    assert load_config(env, kafka={"bootstrap_servers": "argument:1"}).kafka.bootstrap_servers == "argument:1"


def test_children_inherit_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(
        {},
        state=str(tmp_path / "s"),
        kafka={"client": {"security.protocol": "SSL"}},
        lake={"s3_use_ssl": False},
    )
    inherited = load_config(config.environment())
    assert inherited.kafka == config.kafka
    assert inherited.lake == config.lake
    assert inherited.state_dir == config.state_dir


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"ACCRUAL_TOPICS_PARTITIONS": "four"}, "topics.partitions"),
        ({"ACCRUAL_KAFKA_BOOTSTRAP": "x"}, "has no setting 'bootstrap'"),
        ({"ACCRUAL_CONFIG": "nowhere.toml"}, "nowhere.toml"),
    ],
)
def test_a_wrong_setting_is_named(env: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(env)


def test_a_wrong_file_is_named() -> None:
    Path("accrual.toml").write_text("[kafka]\nbootstrap = 1\n")
    with pytest.raises(ConfigError, match="unknown field `bootstrap`"):
        load_config({})
    Path("accrual.toml").write_text("[kafka\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config({})


def test_variables_of_the_tests_are_no_settings() -> None:
    load_config({"ACCRUAL_TEST_BOOTSTRAP": "x", "ACCRUAL_WORKER": "join-1"})
