"""Recovery: replay the changelog into the caches of the partitions that this worker is given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import cast

from accrual.config import Config
from accrual.errors import BrokerUnavailable
from accrual.kafka import KafkaError, KafkaException, TopicNames, TopicPartition, consumer
from streams.state import Record, State

log = logging.getLogger(__name__)


def recover(
    config: Config, states: Mapping[int, State], stopping: threading.Event, alive: Callable[[], None] = lambda: None
) -> None:
    """Replay the changelog into the states of these partitions until each is current, or `stopping` is set.

    `alive` is called now and then: it may take minutes.

    A transaction that a former owner of a partition left open is waited for: the broker ends it after its timeout, and
    until then nobody knows whether it counts. Raises BrokerUnavailable, KafkaException and StateBroken.
    """
    topic = TopicNames(config.topics.prefix).changelog
    group = f"{config.topics.prefix}.join-recovery"
    ends: dict[int, int] = {}
    with closing(consumer(config, group, **{"isolation.level": "read_uncommitted"})) as everything:
        for partition, state in states.items():
            bounds = everything.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            if bounds is None:
                raise BrokerUnavailable(f"the ends of {topic} [{partition}] cannot be read")
            first, ends[partition] = bounds
            if state.offset and not first <= state.offset <= ends[partition]:
                log.warning("%s [%d] ends before the local cache: rebuilt from it", topic, partition)
                state.rebuild()
    behind = {partition for partition, state in states.items() if state.offset < ends[partition]}
    replayed = 0
    with closing(consumer(config, group, **{"enable.partition.eof": True})) as committed:
        committed.assign([TopicPartition(topic, partition, states[partition].offset) for partition in behind])
        while behind and not stopping.is_set():
            alive()
            records: dict[int, list[Record]] = {}
            offsets: dict[int, int] = {}
            for message in committed.consume(10_000, 0.2):
                error, partition, offset = message.error(), cast(int, message.partition()), cast(int, message.offset())
                if error is None:
                    records.setdefault(partition, []).append((cast(bytes, message.key()), message.value()))
                    offsets[partition] = offset + 1
                elif error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                elif offset >= ends[partition]:
                    behind.discard(partition)
                else:
                    log.info("%s [%d]: waiting for a transaction that another worker left open", topic, partition)
            for partition, some in records.items():
                states[partition].save(some, offsets[partition], {})
                replayed += len(some)
    for state in states.values():
        state.flush()  # and with it the timers of what was replayed
    log.info("state of partitions %s is current (%d records replayed)", sorted(states), replayed)
