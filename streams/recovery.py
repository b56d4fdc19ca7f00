"""Recovery: replay the changelog into the caches of the partitions that this worker is given."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import cast

from accrual.config import Config
from accrual.errors import BrokerUnavailable, ChangelogLost
from accrual.kafka import KafkaError, KafkaException, TopicNames, TopicPartition, consumer
from streams.state import Record, State

HANGING_S = 60.0
ASKED_AGAIN_S = 5.0
_WAYS_OUT = (
    "restore the topic and start again; or stop all workers, delete it, make it anew (`accrual topics create`), set the"
    " offsets of the workers' consumer group back to the beginning, and all is joined once more"
)

log = logging.getLogger(__name__)


def changelog_bounds(config: Config, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Where the changelog begins and ends, by partition; open transactions included. Raises BrokerUnavailable."""
    topic = TopicNames(config.topics.prefix).changelog
    bounds = {}
    with closing(consumer(config, _group(config), **{"isolation.level": "read_uncommitted"})) as everything:
        for partition in partitions:
            found = everything.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            if found is None:
                raise BrokerUnavailable(f"the ends of {topic} [{partition}] cannot be read")
            bounds[partition] = found
    return bounds


def is_current(state: State, bounds: tuple[int, int]) -> bool:
    """Whether a state that stayed open is what the changelog is: nothing follows but the mark of its last commit."""
    first, end = bounds
    return first <= state.offset <= end <= state.offset + 1


def recover(
    config: Config,
    states: Mapping[int, State],
    bounds: Mapping[int, tuple[int, int]],
    stopping: threading.Event,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Replay the changelog into the states of these partitions until each is current, or `stopping` is set.

    `bounds` are those of the changelog. `alive` is called now and then: it may take minutes.

    A transaction that a former owner of a partition left open is waited for: the broker ends it after its timeout, and
    until then nobody knows whether it counts. Raises BrokerUnavailable (also when that takes longer than it can),
    KafkaException, StateBroken, and ChangelogLost when the changelog begins after what a state needs of it.
    """
    topic = TopicNames(config.topics.prefix).changelog
    ends = {partition: bounds[partition][1] for partition in states}
    for partition, state in states.items():
        first, end = bounds[partition]
        if state.offset > end:
            log.warning("%s [%d] ends before the local cache: rebuilt from it", topic, partition)
            state.rebuild()
        if state.offset < first:
            raise ChangelogLost(f"{topic} [{partition}] begins at {first}: older records were deleted; {_WAYS_OUT}")
    behind = {partition for partition, state in states.items() if state.offset < ends[partition]}
    replayed, came_at, heard_at = 0, time.monotonic(), -math.inf
    hurried: dict[str, int | bool] = {"enable.partition.eof": True, "fetch.wait.max.ms": 20}  # until it says: no more
    with closing(consumer(config, _group(config), **hurried)) as committed:
        while behind and not stopping.is_set():
            alive()
            if time.monotonic() - heard_at > ASKED_AGAIN_S:  # the end is said once, until asked again
                committed.assign([TopicPartition(topic, partition, states[partition].offset) for partition in behind])
                heard_at = time.monotonic()
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
                elif time.monotonic() - came_at > HANGING_S:
                    raise BrokerUnavailable(
                        f"{topic} [{partition}]: a transaction is open at {offset} for {HANGING_S:.0f} s, longer"
                        " than a worker's may last; if it stays, find and abort it with Kafka's kafka-transactions.sh"
                    )
                else:
                    log.info("%s [%d]: waiting for a transaction that another worker left open", topic, partition)
            for partition, some in records.items():
                states[partition].save(some, offsets[partition], {})
                replayed, came_at = replayed + len(some), time.monotonic()
                heard_at = came_at
    for state in states.values():
        state.flush()  # and with it the timers of what was replayed
    log.info("state of partitions %s is current (%d records replayed)", sorted(states), replayed)


def _group(config: Config) -> str:
    return f"{config.topics.prefix}.join-recovery"


def stands_on(changelog_id: str, offset: int) -> str:
    """What is committed with the consumed offsets: the changelog, and where it ended then."""
    return f"{changelog_id} {offset}"


def check_changelog(config: Config, partition: int, changelog_id: str, end: int, committed: str | None) -> None:
    """Compare the changelog's partition with what a commit stood on (`stands_on`; None: nothing was committed yet).

    `end` is where it ends now. Raises ChangelogLost when it is another topic or has become shorter: the state of what
    was consumed is not in it, and going on would forget predictions in silence.
    """
    if not committed:
        return
    was_id, _, was_end = committed.partition(" ")
    where = f"{TopicNames(config.topics.prefix).changelog} [{partition}]"
    if was_id != changelog_id:
        raise ChangelogLost(
            f"{where} is not the topic that the committed offsets stand on: it was recreated; {_WAYS_OUT}"
        )
    if end < int(was_end):
        raise ChangelogLost(f"{where} ends at {end}, and the committed offsets stand on {was_end}; {_WAYS_OUT}")
