"""What the sink reads: the lake's topics, each topic-partition from where the lake is.

The lake holds the offsets, the consumer group has no say in them: what is in the lake is what was read. A lake that can
have one writer only is read for whole; where there can be several, the group deals the topic-partitions out, and each
one dealt is claimed in the lake before it is read, so that the sink that had it before can commit no more.
"""

from __future__ import annotations

import logging
from typing import Self

from accrual.config import Config
from accrual.errors import BrokerUnavailable, TopicMismatch
from accrual.kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicNames,
    TopicPartition,
    check_topics,
    consumer,
    partition_counts,
)
from accrual.lake import Move, WritableLake
from consumers.progress import Progress
from consumers.rows import readers

# An offset that is gone is an error, never a silent jump; a fetch waits a little for more. A sink that dies is missed
# after ten seconds.
_READING: dict[str, str | int] = {
    "auto.offset.reset": "error",
    "fetch.min.bytes": 65_536,
    "fetch.wait.max.ms": 200,
    "queued.min.messages": 10_000,
    "queued.max.messages.kbytes": 16_384,
    "fetch.message.max.bytes": 262_144,
    "partition.assignment.strategy": "range",
    "session.timeout.ms": 10_000,
}

log = logging.getLogger("accrual.sink")


class Source:
    """A consumer that stands where the lake is. `at`: the next offset of each topic-partition that is this sink's.

    Raises TopicMismatch if topics are missing, BrokerUnavailable, LakeUnavailable.
    """

    def __init__(self, config: Config, lake: WritableLake, progress: Progress) -> None:
        self.at: dict[tuple[str, int], int] = {}
        self._lake = lake
        self._progress = progress
        self._reached: dict[tuple[str, int], int] = {}
        self._markers: list[dict[str, object]] = []
        self._dealt: list[tuple[str, int]] | None = None
        topics = list(readers(TopicNames(config.topics.prefix), {}))
        check_topics(config)
        self._consumer: Consumer = consumer(config, f"{config.topics.prefix}.sink", **_READING, error_cb=self._on_error)
        try:
            if lake.alone:
                counts = partition_counts(config)
                self._stand([(topic, number) for topic in topics for number in range(counts[topic])])
            else:
                self._consumer.subscribe(topics, on_assign=self._on_assign, on_revoke=self._on_revoke)
        except KafkaException as exc:
            self._consumer.close()
            raise BrokerUnavailable(f"the sink cannot read its topics: {exc.args[0].str()}") from exc
        except BaseException:
            self._consumer.close()
            raise

    def read(self, timeout_s: float) -> list[Message] | None:
        """The next records, at most 5,000. None if other topic-partitions are this sink's now.

        What was read and has not moved then is to be dropped: whoever has it now will read it again.
        """
        messages = self._consumer.consume(num_messages=5_000, timeout=timeout_s)
        if self._dealt is not None:
            self._stand(self._dealt)
            return None
        records: list[Message] = []
        for message in messages:
            error = message.error()
            if error is None:
                self._reach(message)
                records.append(message)
            else:
                _judge(message, error)
        return records

    def moves(self) -> list[Move]:
        """From where the lake is to behind the last record read, of each topic-partition."""
        return [Move(*place, self.at[place], end) for place, end in self._reached.items()]

    def markers(self) -> list[dict[str, object]]:
        """The offsets among those that were read which hold no record."""
        return self._markers

    def moved(self) -> None:
        """The moves are in the lake."""
        self.at |= self._reached
        self._reached, self._markers = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def _stand(self, places: list[tuple[str, int]]) -> None:
        """Claim topic-partitions and read them from where the lake is."""
        self._dealt = None
        self._reached, self._markers = {}, []
        known = self._lake.offsets()
        begin = {place: known[place] if place in known else self._first_offset(*place) for place in places}
        self.at = self._lake.claim(begin) if places else {}
        self._consumer.assign([TopicPartition(*place, offset) for place, offset in self.at.items()])

    def _reach(self, record: Message) -> None:
        """Note how far has been read. The consumer leaves nothing out: what it jumps over are transaction markers."""
        place = record.topic() or "", record.partition() or 0
        offset = record.offset() or 0
        expected = self._reached.get(place, self.at[place])
        if offset > expected:
            self._markers.append(
                {"topic": place[0], "partition": place[1], "first_offset": expected, "next_offset": offset}
            )
        self._reached[place] = offset + 1

    def _first_offset(self, topic: str, partition: int) -> int:
        low, _ = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10.0)
        return low

    def _on_assign(self, reader: Consumer, places: list[TopicPartition]) -> None:
        self._dealt = [(place.topic, place.partition) for place in places]
        reader.assign([])  # nothing is read before the lake says from where

    def _on_revoke(self, _reader: Consumer, places: list[TopicPartition]) -> None:
        self._dealt = []
        log.info("%d topic-partitions go to other sinks, or come back", len(places))

    def _on_error(self, error: KafkaError) -> None:
        log.warning("broker: %s", error.str())
        self._progress.trouble(error.str())


def _judge(message: Message, error: KafkaError) -> None:
    """An error that comes instead of a record: raise what cannot heal by reading on, else let the client retry."""
    where = f"{message.topic()} partition {message.partition()}"
    if error.code() == KafkaError._AUTO_OFFSET_RESET:
        raise TopicMismatch(
            f"{where} no longer has the record after the lake's last one ({error.str()}): the topic was recreated or"
            " its records were deleted; give the lake a new folder, or restore the topic"
        )
    if error.fatal() or error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        raise BrokerUnavailable(f"reading {where}: {error.str()}")
    log.warning("reading %s: %s", where, error.str())
