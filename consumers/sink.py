"""The sink: Kafka → Arrow → the lake, each record exactly once. The lake's one writer.

    while not stopping:
        records = read from Kafka until 50,000 records, 16 MB or a second
        tables  = the valid ones as Arrow
        in one lake transaction: append tables; move offsets, if they are still where we think they are
        seal the windows that are complete

The lake holds the offsets, the consumer group has no say: what is in the lake is what was read. So a process killed at
any moment resumes where the last transaction ended, and one that was believed dead cannot commit a batch twice.
Whatever may heal (broker away, lake busy, offsets moved by another) ends in the same place: everything is opened anew
and reading goes on from the lake's offsets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import pyarrow as pa

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import BrokerUnavailable, LakeUnavailable, TopicMismatch, Transient
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
from accrual.lake import Move, WritableLake, open_lake_for_writing
from accrual.lake_tables import TABLES
from consumers.progress import Progress
from consumers.rows import arrow_tables, readers
from consumers.typed_views import make_typed_views
from consumers.windows import Sealer

BATCH_RECORDS = 50_000
BATCH_BYTES = 16 * 2**20
BATCH_SECONDS = 1.0
_LONGEST_PAUSE_S = 15.0
# An offset that is gone is an error, never a silent jump; a fetch waits a little for more.
_READING: dict[str, str | int] = {"auto.offset.reset": "error", "fetch.min.bytes": 65_536, "fetch.wait.max.ms": 200}

log = logging.getLogger("accrual.sink")


def run(config: Config, contracts: Mapping[str, Contract], stop: threading.Event, progress: Progress) -> None:
    """Fill the lake until `stop` is set; then the batch in hand is finished first.

    Waits out whatever is Transient, with growing pauses. Raises LakeLocked if another process is the writer,
    TopicMismatch if topics are missing or were recreated under the lake.
    """
    pause = 0.5
    while not stop.is_set():
        committed = progress.commits
        try:
            with open_lake_for_writing(config) as lake:
                make_typed_views(lake, contracts)
                source = _open_source(config, lake, progress)
                try:
                    _fill(config, contracts, lake, source, stop, progress)
                finally:
                    source.close()
        except Transient as exc:
            pause = 0.5 if progress.commits > committed else min(2 * pause, _LONGEST_PAUSE_S)
            log.warning("%s; trying again in %.1f s", exc, pause)
            progress.trouble(str(exc))
            stop.wait(pause)


def _fill(
    config: Config,
    contracts: Mapping[str, Contract],
    lake: WritableLake,
    source: Consumer,
    stop: threading.Event,
    progress: Progress,
) -> None:
    names = TopicNames(config.topics.prefix)
    by_topic = readers(names, contracts)
    at = lake.offsets()
    sealer = Sealer(lake, contracts, names)
    while not stop.is_set():
        for window in sealer.seal():
            log.info("sealed window %s of %s: %s rows", window["window"], window["stream"], window["rows"])
            progress.sealed(window["stream"])
        progress.turned()
        records = _read_batch(source, stop)
        if not records:
            continue
        started = time.monotonic()
        tables, skipped = arrow_tables(records, by_topic)
        moves, markers = _moves(records, at)
        if markers := [m for m in markers if m["topic"] in (names.predictions, names.outcomes)]:
            tables["markers"] = pa.Table.from_pylist(markers, TABLES["markers"])
        if not lake.append(tables, moves):
            raise LakeUnavailable("the lake's offsets were moved by another writer")
        at |= {(move.topic, move.partition): move.next for move in moves}
        progress.committed(tables, skipped, moves, time.monotonic() - started)
        if strange := [record for record in skipped if record.own]:
            log.error("skipped %d records that no part of Accrual writes, such as %s", len(strange), strange[0])
        sealer.look_at(tables)


def _open_source(config: Config, lake: WritableLake, progress: Progress) -> Consumer:
    """A consumer that stands where the lake ends, on every partition of every topic the lake keeps."""

    def on_error(error: KafkaError) -> None:
        log.warning("broker: %s", error.str())
        progress.trouble(error.str())

    check_topics(config)
    source = consumer(
        config,
        f"{config.topics.prefix}.sink",
        **_READING,
        error_cb=on_error,
    )
    try:
        counts = partition_counts(config)
        wanted = [(t, p) for t in readers(TopicNames(config.topics.prefix), {}) for p in range(counts[t])]
        at = lake.offsets()
        lake.begin_at({key: _first_offset(source, *key) for key in wanted if key not in at})
        at = lake.offsets()
        source.assign([TopicPartition(topic, partition, at[topic, partition]) for topic, partition in wanted])
    except KafkaException as exc:
        source.close()
        raise BrokerUnavailable(f"the sink cannot read its topics: {exc.args[0].str()}") from exc
    except BaseException:
        source.close()
        raise
    return source


def _first_offset(source: Consumer, topic: str, partition: int) -> int:
    low, _ = source.get_watermark_offsets(TopicPartition(topic, partition), timeout=10.0)
    return low


def _read_batch(source: Consumer, stop: threading.Event) -> list[Message]:
    """Records until a batch is full or a second has passed since the first; none if none came for a while."""
    records: list[Message] = []
    size = 0
    until = time.monotonic() + BATCH_SECONDS
    while not stop.is_set() and len(records) < BATCH_RECORDS and size < BATCH_BYTES:
        left = until - time.monotonic()
        if left <= 0:
            break
        for message in source.consume(num_messages=5_000, timeout=min(left, 0.25)):
            error = message.error()
            if error is None:
                records.append(message)
                size += len(message)
            else:
                _judge(message, error)
    return records


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


def _moves(records: list[Message], at: Mapping[tuple[str, int], int]) -> tuple[list[Move], list[dict[str, object]]]:
    """From where the lake is to behind the last record of each topic-partition; and the offsets that hold no record.

    The consumer leaves nothing out, so what it jumps over are the broker's own transaction markers.
    """
    reached: dict[tuple[str, int], int] = {}
    markers: list[dict[str, object]] = []
    for record in records:
        key = (record.topic() or "", record.partition() or 0)
        offset = record.offset() or 0
        expected = reached.get(key, at[key])
        if offset > expected:
            markers.append({"topic": key[0], "partition": key[1], "first_offset": expected, "next_offset": offset})
        reached[key] = offset + 1
    return [Move(topic, partition, at[topic, partition], end) for (topic, partition), end in reached.items()], markers
