"""The development broker, for real: every test starts Kafka from its packages."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accrual import kafka
from accrual.broker import DevelopmentBroker
from accrual.config import Config, Kafka, Topics
from accrual.errors import BrokerSetupError, BrokerUnavailable


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[DevelopmentBroker]:
    broker = DevelopmentBroker(tmp_path / "broker")
    yield broker
    broker.stop()


def _config(bootstrap: str) -> Config:
    return Config(kafka=Kafka(bootstrap_servers=bootstrap), topics=Topics(prefix="kept", partitions=2))


def test_life_of_a_broker(broker: DevelopmentBroker) -> None:
    assert broker.status() is None
    assert broker.stop() is False

    first = broker.start()
    kafka.wait_until_ready(first.bootstrap, timeout_s=1)
    created = kafka.create_topics(_config(first.bootstrap))

    # Another process sees it by the folder alone, and cannot start a second one there.
    elsewhere = DevelopmentBroker(broker.folder)
    assert elsewhere.status() == first
    with pytest.raises(BrokerSetupError, match=rf"already runs at {first.bootstrap}.*accrual broker stop"):
        elsewhere.start()
    kafka.wait_until_ready(first.bootstrap, timeout_s=1)

    assert elsewhere.stop() is True
    assert broker.status() is None
    with pytest.raises(BrokerUnavailable, match=first.bootstrap):
        kafka.wait_until_ready(first.bootstrap, timeout_s=0.5)

    # A restart, here on another port, finds the topics of the first life.
    second = broker.start()
    assert second.port != first.port
    assert set(created) <= set(kafka.partition_counts(_config(second.bootstrap)))


def test_taken_port_is_named_with_the_fix(broker: DevelopmentBroker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerSetupError, match=rf"port {port} .*--port"):
            broker.start(port=port)
    assert broker.status() is None
    assert broker.start(port=port).port == port


def test_a_killed_broker_leaves_nothing_that_hinders_the_next(broker: DevelopmentBroker) -> None:
    killed = broker.start()
    os.kill(killed.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while broker.status() is not None:
        assert time.monotonic() < deadline, "a killed broker still counts as running"
    assert broker.start().pid != killed.pid


@pytest.mark.slow
def test_a_transaction_that_a_killed_broker_left_open_is_aborted_and_holds_no_reader_up(
    broker: DevelopmentBroker,
) -> None:
    running = broker.start()
    config = _config(running.bootstrap)
    kafka.create_topics(config)
    topic = kafka.TopicNames("kept").ground_truth
    worker = kafka.transactional_producer(config, "worker", **{"transaction.timeout.ms": 2_000})
    worker.init_transactions(20)
    worker.begin_transaction()
    for partition in range(2):
        worker.produce(topic, b"row", b"key", partition)
    assert worker.flush(20) == 0
    os.kill(running.pid, signal.SIGKILL)
    time.sleep(4)  # longer than the transaction may last
    running = broker.start(running.port)
    reader = kafka.consumer(config, "reader")
    ends: list[int] = []
    deadline = time.monotonic() + 60
    while ends != [2, 2] and time.monotonic() < deadline:
        time.sleep(1)
        try:
            bounds = [reader.get_watermark_offsets(kafka.TopicPartition(topic, n), timeout=10) for n in range(2)]
        except kafka.KafkaException:
            continue  # it answers a little before it leads its partitions again
        ends = [end for _, end in filter(None, bounds)]
    reader.close()
    assert ends == [2, 2], "the record and the mark that it does not count"


def test_a_lock_file_that_names_another_program_is_not_believed(broker: DevelopmentBroker) -> None:
    broker.folder.mkdir()
    (broker.folder / "broker.lock").write_text(f'{{"pid": {os.getpid()}, "port": 9}}')
    assert broker.status() is None
    assert broker.stop() is False


def test_java_that_fails_is_reported_with_its_last_words(broker: DevelopmentBroker) -> None:
    (broker.folder / "data").mkdir(parents=True)
    (broker.folder / "data" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=another\n")
    with pytest.raises(BrokerSetupError, match=r"(?s)ended at once.*broker\.log.*node id 7"):
        broker.start()
    assert broker.status() is None


def test_a_broker_that_does_not_answer_in_time_is_stopped(broker: DevelopmentBroker) -> None:
    with pytest.raises(BrokerSetupError, match="did not answer within 0 s"):
        broker.start(timeout_s=0)
    assert broker.status() is None
