"""The ground of the demo: its own folder and topics, renewed each run, and nobody else's touched."""

from pathlib import Path

import msgspec
import pytest

from accrual.broker import DevelopmentBroker
from accrual.config import Config, Kafka, Topics
from accrual.contract import load_contracts
from accrual.errors import BrokerUnavailable, ConfigError
from accrual.kafka import create_topics, partition_counts
from examples.ground import own_folder, prepare, reached_broker, shipped_contract

SHIPPED = Path(__file__).parents[2] / "schemas" / "contracts"


@pytest.fixture
def config(bootstrap: str, prefix: str, tmp_path: Path) -> Config:
    return Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=2),
        state=str(tmp_path / "state"),
        contracts=str(SHIPPED),
    )


def test_a_second_run_starts_clean_and_leaves_what_is_not_its_own(config: Config) -> None:
    contract = shipped_contract(config, "support-intents", 0)
    create_topics(config)
    with own_folder(config) as home:
        first, removed = prepare(config, home, contract)
        assert not removed
        (home / "lake").mkdir()
    with own_folder(config) as home:
        second, removed = prepare(config, home, contract)
        assert removed
        assert not (home / "lake").exists()
    assert first.topics.prefix != second.topics.prefix
    topics = partition_counts(config)
    assert not [name for name in topics if name.startswith(f"{first.topics.prefix}.")]
    assert [name for name in topics if name.startswith(f"{second.topics.prefix}.")]
    assert topics[f"{config.topics.prefix}.predictions"] == 2


def test_a_folder_that_no_demo_made_is_left_alone(config: Config) -> None:
    home = config.state_dir / "demo"
    home.mkdir(parents=True)
    (home / "thesis.txt").write_text("mine")
    with own_folder(config) as home, pytest.raises(ConfigError, match="was not made by a demo"):
        prepare(config, home, shipped_contract(config, "support-intents", 0))
    assert (home / "thesis.txt").read_text() == "mine"


def test_two_demos_do_not_share_a_folder(config: Config) -> None:
    with own_folder(config), pytest.raises(ConfigError, match="already runs"), own_folder(config):
        pass


@pytest.mark.parametrize("stream", ["support-intents", "credit-risk"])
def test_the_contract_written_for_the_workers_is_the_shipped_one(config: Config, stream: str) -> None:
    contract = shipped_contract(config, stream, 400)
    with own_folder(config) as home:
        own, _ = prepare(config, home, contract)
    written = load_contracts(Path(own.contracts))
    assert list(written) == [stream]
    shipped = load_contracts(SHIPPED)[stream]
    assert written[stream].training.window_rows == 400
    assert written[stream].inputs == shipped.inputs and written[stream].horizon == shipped.horizon
    if (rows := shipped.training.triggers.rows) is not None:
        trained_after = rows / shipped.training.window_rows
        assert written[stream].training.triggers.rows == 400 * trained_after, "after as many windows"


def test_a_broker_that_answers_is_used_and_left_running(config: Config) -> None:
    with reached_broker(config, keep=False) as (reached, started):
        assert reached == config and not started
    assert partition_counts(config) is not None


def test_without_one_a_broker_is_started_and_stopped(config: Config) -> None:
    nobody = msgspec.structs.replace(config, kafka=Kafka(bootstrap_servers="127.0.0.1:1"))
    with reached_broker(nobody, keep=False) as (reached, started):
        assert started
        assert partition_counts(reached) is not None
    assert DevelopmentBroker(config.state_dir / "broker").status() is None


def test_a_broker_elsewhere_is_not_replaced_by_one_here(config: Config) -> None:
    far = msgspec.structs.replace(config, kafka=Kafka(bootstrap_servers="broker.invalid:9092"))
    with pytest.raises(BrokerUnavailable, match=r"broker\.invalid"), reached_broker(far, keep=False):
        pass
