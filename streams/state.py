"""What the join remembers of one partition: a RocksDB database that is a cache of the changelog topic's partition.

The truth is the compacted changelog. After each Kafka transaction the database gets one batch: the records that went to
the changelog, the timers, and the position in the changelog that they stand for. All are in one column family and the
write-ahead log is off: what a crash takes from memory, it takes from the end, batch by batch, position included. So
the database is always what the changelog was at its position, and replaying from there makes it current.

Keys, in the database and (but for timers and the cache's own record) in the changelog:

    e <stream> / <prediction_id>            → Entry
    p <stream>                              → Progress
    t <stream> NUL <due, 8 bytes> <id>      → nothing: when `on_time` has something to do; may be early, never late
    cache                                   → Position
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import msgspec
from rocksdict import BlockBasedOptions, Cache, Options, Rdict, WriteBatch, WriteOptions

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import BrokerUnavailable, Transient
from accrual.kafka import KafkaError, KafkaException, TopicNames, TopicPartition, consumer
from streams.join import Entry, Progress, due, pack, unpack_entry, unpack_progress

log = logging.getLogger(__name__)

ENTRY, PROGRESS, TIMER, CACHE = b"e", b"p", b"t", b"cache"
MAX_AGE_S = 12 * 3600  # compaction drops a tombstone after delete.retention.ms (24 h): an older cache may miss one

_LAST = 2**63 - 1

Record = tuple[bytes, bytes | None]


class StateBroken(Transient):
    """The cache cannot be read or written; closing it removes it, and the next one is rebuilt from the changelog."""


class Position(msgspec.Struct, frozen=True, array_like=True):
    """What the database stands for: the changelog `topic_id` up to `offset`, timers by `timing`, as of `saved_at`."""

    topic_id: str
    timing: str
    offset: int
    saved_at: float


_decode_position = msgspec.msgpack.Decoder(Position).decode


def entry_key(stream: str, prediction_id: str) -> bytes:
    """The key of an entry."""
    return f"e{stream}/{prediction_id}".encode()


def progress_key(stream: str) -> bytes:
    """The key of a stream's progress in this partition."""
    return f"p{stream}".encode()


def timer_key(stream: str, when: int, prediction_id: str) -> bytes:
    """The key of a timer; keys of one stream sort by time."""
    return b"t%b\0%b%b" % (stream.encode(), min(max(when, 0), _LAST).to_bytes(8, "big"), prediction_id.encode())


def split_entry_key(key: bytes) -> tuple[str, str]:
    """Stream and prediction id of an entry's key."""
    stream, _, prediction_id = key[1:].decode().partition("/")
    return stream, prediction_id


def timed_id(key: bytes, stream: str) -> str:
    """The prediction id in a timer's key."""
    return key[len(stream) + 10 :].decode()


class State:
    """One partition's state. One thread at a time; `close` flushes it to disk."""

    def __init__(self, path: Path, topic_id: str, contracts: Mapping[str, Contract]) -> None:
        """Open the cache at `path`, or make it anew (`offset` is then 0) when it cannot be trusted.

        It is dropped when it does not open, belongs to another topic, is too old, or has timers by other horizons.
        """
        self.progress: dict[str, Progress] = {}
        self.offset = 0
        self._contracts = contracts
        self._topic_id = topic_id
        self._timing = str(sorted((s, c.horizon_us, c.disorder_us, c.remember_us) for s, c in contracts.items()))
        self._unlogged = WriteOptions()
        setattr(self._unlogged, "disable_wal", True)  # noqa: B010 - an attribute, whatever rocksdict's types say
        self._path = path
        self._broken = False
        try:
            self._db = _open(path)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises nothing more particular
            log.warning("%s does not open (%s): rebuilt from the changelog", path, exc)
            self._make_anew()
            return
        stale = self._load()
        if stale:
            log.info("%s: %s: rebuilt from the changelog", path, stale)
            self.rebuild()

    def entries(self, keys: Sequence[bytes]) -> dict[bytes, Entry | None]:
        """The entries of these keys; fastest when sorted."""
        with self._engine():
            values = cast(list[bytes | None], self._db.get(list(keys)))
        return {key: None if value is None else unpack_entry(value) for key, value in zip(keys, values, strict=True)}

    def timers(self, stream: str, watermark: int, limit: int) -> list[bytes]:
        """At most `limit` keys of timers that are due, earliest first."""
        prefix = b"t%b\0" % stream.encode()
        end = prefix + min(watermark, _LAST).to_bytes(8, "big") + b"\xff"
        found: list[bytes] = []
        with self._engine():
            timers = self._db.iter()
            timers.seek(prefix)
            while timers.valid() and (key := timers.key()) <= end and len(found) < limit:
                found.append(key)
                timers.next()
        return found

    def save(self, records: Iterable[Record], timers: Iterable[bytes], fired: Iterable[bytes], offset: int) -> None:
        """Take over what the changelog holds up to `offset`, with the timers that were set and those that fired."""
        batch = WriteBatch(raw_mode=True)
        for key in fired:
            batch.delete(key)
        for key, value in records:
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
                if key.startswith(PROGRESS):
                    self.progress[key[1:].decode()] = unpack_progress(value)
        for key in timers:
            batch.put(key, b"")
        batch.put(CACHE, pack(Position(self._topic_id, self._timing, offset, time.time())))
        with self._engine():
            self._db.write(batch, self._unlogged)
        self.offset = offset

    def replay(self, records: Sequence[Record], offset: int) -> None:
        """Take over records read back from the changelog, in order; their timers follow from them."""
        self.save(records, self._timers_of(records), (), offset)
        for key, value in records:
            if key.startswith(PROGRESS) and value is not None:
                self.progress[key[1:].decode()] = unpack_progress(value)

    def rebuild(self) -> None:
        """Forget everything: the changelog is to be replayed from its beginning."""
        self._db.close()
        self._make_anew()

    def close(self) -> None:
        """Write everything to disk and close; a broken cache is removed."""
        if not self._broken:
            with self._engine():
                self._db.flush()
        self._db.close()
        if self._broken:
            shutil.rmtree(self._path, ignore_errors=True)

    @contextmanager
    def _engine(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._broken = True
            raise StateBroken(f"{self._path}: {exc}; it will be rebuilt from the changelog") from exc

    def _timers_of(self, records: Iterable[Record]) -> Iterator[bytes]:
        for key, value in records:
            if key.startswith(ENTRY) and value is not None:
                stream, prediction_id = split_entry_key(key)
                if stream in self._contracts:
                    yield timer_key(stream, due(unpack_entry(value), self._contracts[stream]), prediction_id)

    def _load(self) -> str | None:
        """Read position and progress. Returns why the cache must not be used, if so."""
        try:
            saved = self._db.get(CACHE)
            if saved is None:
                return None
            position = _decode_position(saved)
            progress = {stream: self._db.get(progress_key(stream)) for stream in self._contracts}
        except Exception as exc:  # noqa: BLE001 - rocksdict's or msgspec's: either way it cannot be read
            return f"it cannot be read ({exc})"
        if position.topic_id != self._topic_id:
            return "it belongs to another changelog"
        if position.timing != self._timing:
            return "horizon, disorder or remember has changed"
        if time.time() - position.saved_at > MAX_AGE_S:
            return f"it is older than {MAX_AGE_S // 3600} h"
        self.offset = position.offset
        self.progress = {s: unpack_progress(value) for s, value in progress.items() if value is not None}
        return None

    def _make_anew(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        self._db = _open(self._path)
        self.offset, self.progress, self._broken = 0, {}, False


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
                states[partition].replay(some, offsets[partition])
                replayed += len(some)
    log.info("state of partitions %s is current (%d records replayed)", sorted(states), replayed)


def _open(path: Path) -> Rdict:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    table.set_block_cache(Cache(32 << 20))
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_size(32 << 20)
    options.set_memtable_whole_key_filtering(True)
    options.set_memtable_prefix_bloom_ratio(0.1)
    options.set_keep_log_file_num(2)
    return Rdict(str(path), options)
