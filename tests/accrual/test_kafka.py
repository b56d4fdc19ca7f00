"""Clients and topics against the real broker."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import pytest

from accrual.config import Config, load_config
from accrual.errors import BrokerUnavailable, TopicMismatch
from accrual.kafka import (
    TopicNames,
    check_topics,
    create_topics,
    first_offsets_since,
    partition_counts,
    partition_of,
    producer,
    read_to_end,
    retentions,
    transactional_producer,
    wait_until_ready,
)


@pytest.fixture
def config(bootstrap: str, prefix: str) -> Config:
    return load_config({}, kafka={"bootstrap_servers": bootstrap}, topics={"prefix": prefix, "partitions": 3})


def test_topics_are_made_once_and_then_checked(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    assert set(create_topics(config)) == set(names.settings(3))
    assert create_topics(config) == []
    assert check_topics(config) == 3
    assert partition_counts(config)[names.models] == 1


def test_missing_topics_and_differing_counts_name_the_fix(config: Config) -> None:
    with pytest.raises(TopicMismatch, match="accrual topics create"):
        check_topics(config)
    create_topics(config)
    other = load_config(
        {},
        kafka={"bootstrap_servers": config.kafka.bootstrap_servers},
        topics={"prefix": config.topics.prefix + "x", "partitions": 2},
    )
    create_topics(other)
    from confluent_kafka.admin import AdminClient, NewPartitions  # the one thing Accrual itself never does

    admin = AdminClient({"bootstrap.servers": config.kafka.bootstrap_servers})
    topic = TopicNames(other.topics.prefix).outcomes
    admin.create_partitions([NewPartitions(topic, 5)])[topic].result()
    deadline = time.monotonic() + 30  # the broker answers before its metadata say so
    while partition_counts(other)[topic] != 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(TopicMismatch, match="same number of partitions"):
        check_topics(other)


def test_no_broker_says_so_and_what_to_do() -> None:
    with pytest.raises(BrokerUnavailable, match="accrual broker start"):
        wait_until_ready("127.0.0.1:9", 0.5)


@dataclass
class Delivered:
    """Partitions that the broker acknowledged, by key."""

    partitions: dict[bytes, int]

    def __call__(self, error: object, message: object) -> None:
        assert error is None
        self.partitions[message.key()] = message.partition()  # type: ignore[attr-defined]


def test_partition_of_is_where_the_producer_puts_a_key(config: Config) -> None:
    create_topics(config)
    topic = TopicNames(config.topics.prefix).predictions
    delivered = Delivered({})
    client = producer(config)
    keys = [os.urandom(n) for n in range(1, 40) for _ in range(5)]
    for key in keys:
        client.produce(topic, key=key, value=b"", on_delivery=delivered)
    assert client.flush(20) == 0
    assert {key: partition_of(key, 3) for key in keys} == delivered.partitions


def test_reading_to_the_end_sees_committed_records_only(config: Config) -> None:
    create_topics(config)
    topic = TopicNames(config.topics.prefix).ground_truth
    client = transactional_producer(config, f"{config.topics.prefix}-tx")
    client.init_transactions()
    for number, commit in enumerate([True, False, True]):
        client.begin_transaction()
        client.produce(topic, key=b"k", value=str(number).encode())
        client.flush()
        (client.commit_transaction if commit else client.abort_transaction)()
    assert [message.value() for message in read_to_end(config, topic)] == [b"0", b"2"]


def test_reading_may_start_where_a_moment_was(config: Config) -> None:
    create_topics(config)
    topic = TopicNames(config.topics.prefix).outcomes
    client = producer(config)
    for value in (b"before", b"after"):
        client.produce(topic, key=b"k", value=value, partition=1)
        assert client.flush(20) == 0
        time.sleep(0.01)
    [_, second] = read_to_end(config, topic)
    moment = second.timestamp()[1]
    assert [m.value() for m in read_to_end(config, topic, first_offsets_since(config, topic, moment))] == [b"after"]
    assert list(read_to_end(config, topic, first_offsets_since(config, topic, moment + 1))) == []


def test_retentions_are_those_of_the_broker(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accrual.kafka._LARGE", {"retention.ms": "86400000"})
    assert retentions(config) == {}
    create_topics(config)
    names, found = TopicNames(config.topics.prefix), retentions(config)
    assert set(found) == set(names.settings(1))
    assert (found[names.predictions], found[names.ground_truth]) == (None, timedelta(days=1))
    assert found[names.changelog] is None  # compacted: its retention.ms says nothing
