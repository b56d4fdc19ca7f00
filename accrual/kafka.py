"""Kafka clients and topics: the only importer of confluent_kafka.

Every client is made here: what correctness rests on (idempotence, `murmur2_random`, `read_committed`) is set once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic  # type: ignore[attr-defined]

from accrual.config import Config
from accrual.errors import BrokerUnavailable, TopicMismatch

__all__ = [
    "MAX_JOINED_BYTES",
    "OFFSET_BEGINNING",
    "Consumer",
    "KafkaError",
    "KafkaException",
    "Message",
    "Producer",
    "TopicNames",
    "TopicPartition",
    "check_topics",
    "consumer",
    "create_topics",
    "delete_topics",
    "first_offsets_since",
    "partition_counts",
    "partition_of",
    "producer",
    "read_to_end",
    "retentions",
    "topic_id",
    "transactional_producer",
    "wait_until_ready",
]

_COMPACTED = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.2"}
_KEPT = {"retention.ms": "-1"}
# What the join writes may hold several events of up to a megabyte: a prediction with its outcomes, base64 of a letter.
MAX_JOINED_BYTES = 16 << 20
_LARGE = {"max.message.bytes": str(MAX_JOINED_BYTES)}


class TopicNames(msgspec.Struct, frozen=True):
    """The names of Accrual's topics under one prefix."""

    prefix: str

    @property
    def predictions(self) -> str:
        """What models said, keyed by prediction_id."""
        return f"{self.prefix}.predictions"

    @property
    def outcomes(self) -> str:
        """What happened, keyed by prediction_id; as many partitions as predictions."""
        return f"{self.prefix}.outcomes"

    @property
    def ground_truth(self) -> str:
        """Labeled and expired predictions, exactly once, keyed by prediction_id."""
        return f"{self.prefix}.ground-truth"

    @property
    def dead_letters(self) -> str:
        """Events that broke their contract, with reason and original bytes."""
        return f"{self.prefix}.dead-letters"

    @property
    def changelog(self) -> str:
        """The join's state, compacted; partition n holds the state of input partition n."""
        return f"{self.prefix}.join-changelog"

    @property
    def models(self) -> str:
        """Published generations, compacted, keyed by stream: the last one is the champion."""
        return f"{self.prefix}.models"

    @property
    def training(self) -> str:
        """The trainer's ledger: runs, evaluations and verdicts; one partition."""
        return f"{self.prefix}.training"

    def settings(self, partitions: int) -> dict[str, tuple[int, dict[str, str]]]:
        """Partition count and topic configuration by topic name. All use the broker's append time (decision 4)."""
        shape: dict[str, tuple[int, dict[str, str]]] = {
            self.predictions: (partitions, _KEPT),
            self.outcomes: (partitions, _KEPT),
            self.ground_truth: (partitions, _KEPT | _LARGE),
            self.dead_letters: (1, _KEPT | _LARGE),
            self.changelog: (partitions, _COMPACTED | _LARGE),
            self.models: (1, _COMPACTED),
            self.training: (1, _KEPT),
        }
        return {
            name: (count, {**extra, "message.timestamp.type": "LogAppendTime"})
            for name, (count, extra) in shape.items()
        }


def producer(config: Config, **properties: str | int | float | Callable[..., None]) -> Producer:
    """An idempotent producer that partitions like Java clients do. `properties` win over the defaults."""
    return Producer(
        {
            **_client(config),
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "linger.ms": 5,
            **properties,
        }
    )


def transactional_producer(config: Config, transactional_id: str, **properties: str | int | float) -> Producer:
    """A producer whose records commit in transactions; the caller calls `init_transactions` (it fences older ones)."""
    defaults: dict[str, str | int] = {
        "transactional.id": transactional_id,
        "transaction.timeout.ms": 60_000,
        # When all brokers are away at once the client's default is to forget them and start from the bootstrap servers.
        # It then waits for the forgotten group coordinator for ever (docs/decisions/0009).
        "metadata.recovery.strategy": "none",
    }
    return producer(config, **{**defaults, **properties})


def consumer(config: Config, group: str, **properties: str | int | float | bool | Callable[..., None]) -> Consumer:
    """A consumer of committed records that starts at the beginning and never commits by itself."""
    return Consumer(
        {
            **_client(config),
            "group.id": group,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            **properties,
        }
    )


def wait_until_ready(bootstrap: str, timeout_s: float) -> None:
    """Return once a broker answers a metadata request. Raises BrokerUnavailable after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    while True:
        try:
            if admin.list_topics(timeout=1.0).brokers:
                return
            reason = "its metadata names no broker"
        except KafkaException as exc:
            reason = exc.args[0].str()
        if time.monotonic() > deadline:
            raise BrokerUnavailable(_no_answer(bootstrap, reason))


def create_topics(config: Config) -> list[str]:
    """Create the topics that are missing; returns their names. Topics that exist are left as they are, then checked."""
    admin = _admin(config)
    existing = _topics(admin, config)
    shape = TopicNames(config.topics.prefix).settings(config.topics.partitions)
    missing = [
        NewTopic(name, num_partitions=count, replication_factor=config.topics.replication, config=extra)
        for name, (count, extra) in shape.items()
        if name not in existing
    ]
    for name, future in (admin.create_topics(missing) if missing else {}).items():
        try:
            future.result()
        except KafkaException as exc:
            if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise TopicMismatch(f"topic {name} cannot be created: {exc.args[0].str()}") from exc
    deadline = time.monotonic() + 30
    while not set(shape) <= set(_topics(admin, config)) and time.monotonic() < deadline:
        time.sleep(0.1)
    check_topics(config)
    return [topic.topic for topic in missing]


def delete_topics(config: Config) -> None:
    """Delete the topics under the configured prefix, as far as they are there. Raises BrokerUnavailable."""
    admin = _admin(config)
    there = set(_topics(admin, config)) & set(TopicNames(config.topics.prefix).settings(1))
    for future in (admin.delete_topics(sorted(there)) if there else {}).values():
        try:
            future.result()
        except KafkaException as exc:
            raise BrokerUnavailable(f"topics cannot be deleted: {exc.args[0].str()}") from exc


def check_topics(config: Config) -> int:
    """The common partition count of predictions, outcomes, ground truth and changelog.

    Raises TopicMismatch, naming the fix, when a topic is missing or the counts differ: keys would not meet.
    """
    names = TopicNames(config.topics.prefix)
    existing = partition_counts(config)
    absent = [name for name in names.settings(1) if name not in existing]
    if absent:
        raise TopicMismatch(f"missing topics: {', '.join(absent)}; create them with `accrual topics create`")
    counts = {name: existing[name] for name in (names.predictions, names.outcomes, names.ground_truth, names.changelog)}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise TopicMismatch(
            f"topics that are joined need the same number of partitions: {shown}; recreate the one that differs"
        )
    return counts[names.predictions]


def partition_counts(config: Config) -> dict[str, int]:
    """Partition count of every topic on the broker. Raises BrokerUnavailable."""
    return _topics(_admin(config), config)


def topic_id(config: Config, topic: str) -> str:
    """The id the broker gave the topic when it was made: another topic of the same name has another one.

    Raises BrokerUnavailable, and TopicMismatch when there is no such topic.
    """
    admin = _admin(config)  # kept while the answer is awaited
    try:
        [described] = admin.describe_topics(TopicCollection([topic])).values()
        return str(described.result().topic_id)
    except KafkaException as exc:
        if exc.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise TopicMismatch(f"missing topic: {topic}; create it with `accrual topics create`") from exc
        raise BrokerUnavailable(_no_answer(config.kafka.bootstrap_servers, exc.args[0].str())) from exc


def retentions(config: Config) -> dict[str, timedelta | None]:
    """How long each of our topics keeps a record after it arrived, None for ever. A compacted one keeps a key's last.

    Raises BrokerUnavailable.
    """
    admin = _admin(config)
    there = set(_topics(admin, config)) & set(TopicNames(config.topics.prefix).settings(1))
    wanted = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in sorted(there)]
    found: dict[str, timedelta | None] = {}
    for resource, future in admin.describe_configs(wanted).items() if wanted else ():
        try:
            settings = future.result()
        except KafkaException as exc:
            raise BrokerUnavailable(_no_answer(config.kafka.bootstrap_servers, exc.args[0].str())) from exc
        kept_ms = int(settings["retention.ms"].value)
        compacted = "delete" not in settings["cleanup.policy"].value
        found[resource.name] = None if compacted or kept_ms < 0 else timedelta(milliseconds=kept_ms)
    return found


def read_to_end(
    config: Config, topic: str, starts: Mapping[int, int] | None = None, timeout_s: float = 30.0
) -> Iterator[Message]:
    """All committed records of a topic as of now, in order within a partition; from its beginning where `starts` names
    no offset of the partition. Raises BrokerUnavailable when nothing comes for `timeout_s`.
    """
    reader = consumer(config, f"{config.topics.prefix}.reader", **{"enable.partition.eof": True})
    try:
        count = _topics(reader, config).get(topic, 0)
        open_partitions = set(range(count))
        begin = starts or {}
        reader.assign([TopicPartition(topic, p, begin.get(p, OFFSET_BEGINNING)) for p in open_partitions])
        deadline = time.monotonic() + timeout_s
        while open_partitions:
            message = reader.poll(0.5)
            if message is None:
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(f"reading {topic}: nothing came for {timeout_s:.0f} s")
                continue
            error = message.error()
            if error is None:
                yield message
                deadline = time.monotonic() + timeout_s
            elif error.code() == KafkaError._PARTITION_EOF:
                open_partitions.discard(message.partition())
            elif error.fatal():
                raise BrokerUnavailable(f"reading {topic}: {error.str()}")
    finally:
        reader.close()


def first_offsets_since(config: Config, topic: str, arrived_ms: int) -> dict[int, int]:
    """For `read_to_end`: where the records of each partition begin that arrived at this time (Unix ms) or later.

    Raises BrokerUnavailable.
    """
    reader = consumer(config, f"{config.topics.prefix}.reader")
    try:
        count = _topics(reader, config).get(topic, 0)
        asked = [TopicPartition(topic, p, arrived_ms) for p in range(count)]
        return {found.partition: found.offset for found in reader.offsets_for_times(asked, timeout=10.0)}
    except KafkaException as exc:
        raise BrokerUnavailable(_no_answer(config.kafka.bootstrap_servers, exc.args[0].str())) from exc
    finally:
        reader.close()


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Java clients and `murmur2_random` choose for a key."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bit, as in Kafka's `Utils.murmur2` (the algorithm is Austin Appleby's, public domain)."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def _no_answer(bootstrap: str, reason: str) -> str:
    start = "start one with `accrual broker start` or set kafka.bootstrap_servers"
    return f"no Kafka broker answers at {bootstrap} ({reason}); {start}"


def _admin(config: Config) -> AdminClient:
    """Quiet: what goes wrong is raised, and says it once."""
    return AdminClient({**_client(config), "log_level": 0})


def _client(config: Config) -> dict[str, Any]:
    return {"bootstrap.servers": config.kafka.bootstrap_servers, **config.kafka.client}


def _topics(client: AdminClient | Consumer, config: Config) -> dict[str, int]:
    try:
        metadata = client.list_topics(timeout=10.0)
    except KafkaException as exc:
        raise BrokerUnavailable(_no_answer(config.kafka.bootstrap_servers, exc.args[0].str())) from exc
    return {name: len(topic.partitions) for name, topic in metadata.topics.items()}
