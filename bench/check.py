"""What came out, compared with what must: each id once, with its label; and how long each took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import msgspec
from load import Load, expected_label

from accrual.config import Config
from accrual.kafka import OFFSET_BEGINNING, KafkaError, Message, TopicNames, TopicPartition, consumer


class Row(msgspec.Struct):
    """What every contender's row says."""

    prediction_id: str
    label: str


@dataclass(frozen=True)
class Verdict:
    """Of the output: rows, ids that have none, rows beyond the first of an id, rows with a wrong label or id."""

    rows: int
    missing: int
    extra: int
    wrong: int

    def __str__(self) -> str:
        if not (self.missing or self.extra or self.wrong):
            return "exact"
        parts = {"missing": self.missing, "extra": self.extra, "wrong": self.wrong}
        return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)


_decode = msgspec.json.Decoder(Row).decode


def verdict(config: Config, topic: str, load: Load) -> Verdict:
    """Read the whole output topic and compare."""
    seen = bytearray(load.answered)
    rows = extra = wrong = 0
    for message in records(config, topic):
        row = _decode(message.value() or b"")
        number = int(row.prediction_id, 16)
        rows += 1
        if number >= load.answered or row.label != expected_label(number):
            wrong += 1
            continue
        extra += seen[number] > 0
        seen[number] = 1
    return Verdict(rows, load.answered - sum(seen), extra, wrong)


def delays_ms(config: Config, output: str, load: Load, after_ms: int) -> list[float]:
    """Milliseconds from the append of the event that completed an id to the append of its first row.

    Of the ids that were completed at `after_ms` (of the broker's clock) or later.
    """
    names = TopicNames(config.topics.prefix)
    completed = [0] * load.answered
    for topic in (names.predictions, names.outcomes):
        first: dict[int, int] = {}
        for message in records(config, topic):
            first.setdefault(_number(message), message.timestamp()[1])
        for number, moment in first.items():
            if number < load.answered:
                completed[number] = max(completed[number], moment)
    delays: dict[int, float] = {}
    for message in records(config, output):
        number = _number(message)
        if completed[number] >= after_ms:
            delays.setdefault(number, message.timestamp()[1] - completed[number])
    return list(delays.values())


def records(config: Config, topic: str) -> Iterator[Message]:
    """All committed records of a topic, in order within a partition."""
    with closing(consumer(config, "bench-check", **{"enable.partition.eof": True})) as reader:
        partitions = set(range(config.topics.partitions))
        reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        while partitions:
            for message in reader.consume(20_000, 0.2):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    partitions.discard(message.partition())
                else:
                    raise SystemExit(f"{topic} cannot be read: {error.str()}")


def _number(message: Message) -> int:
    return int(message.key() or b"", 16)
