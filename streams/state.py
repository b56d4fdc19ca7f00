"""What the join remembers of one partition: a RocksDB database that is a cache of the changelog topic's partition.

The truth is the compacted changelog. After each Kafka transaction the records that went to the changelog are put into
memory: two generations, a younger and an older one. When the younger one is full, what the older one holds (and the
younger does not, because it is newer there) goes to the database in one sorted batch, with the position in the
changelog that it stands for; then the younger becomes the older. So what is joined soon after it was predicted is
written once, and the database trails the changelog by at most two generations.

All keys are in one column family and the write-ahead log is off: what a crash takes from the database, it takes from
the end, batch by batch, position included. So the database is always what the changelog was at its position, but for
keys that a later record replaces, and replaying from there makes it current.

Keys, in the database and (but for timers and the cache's own record) in the changelog:

    e <stream> / <prediction_id>            → Entry
    k <stream> / <entity>                   → Entity
    p <stream>                              → Progress
    t <stream> NUL <due, 8 bytes> <flush>   → when `on_time` has something to do for some ids, none before `due`;
                                              may be early, never late
    cache                                   → Position
"""

from __future__ import annotations

import logging
import shutil
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import msgspec
from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteBatch, WriteOptions

from accrual.contract import Contract
from accrual.errors import Transient
from streams import entity as by_entity
from streams.entity import Entity, unpack_entity
from streams.join import Entry, Progress, due, pack, unpack_entry, unpack_progress

log = logging.getLogger(__name__)

ENTRY, ENTITY, PROGRESS, TIMER, CACHE = b"e", b"k", b"p", b"t", b"cache"
MAX_AGE_S = 12 * 3600  # compaction drops a tombstone after delete.retention.ms (24 h): an older cache may miss one
YOUNGER_KEYS = 50_000  # a generation's, unless told otherwise: about 25 MB
CHUNK_IDS = 512  # of one timer
_FLUSH_AFTER_S = 300.0
_LAST = 2**63 - 1

Record = tuple[bytes, bytes | None]
Timer = tuple[str, int, str]  # stream, due, prediction id; of an entity: `entity_timers`, due, entity
Known = TypeVar("Known", Entry, Entity)


class StateBroken(Transient):
    """The cache cannot be read or written; closing it removes it, and the next one is rebuilt from the changelog."""


class Position(msgspec.Struct, frozen=True, array_like=True):
    """What the database stands for: the changelog `topic_id` up to `offset`, timers by `timing`, as of `saved_at`.

    `flushes` counts the batches, so that no two timers have the same key.
    """

    topic_id: str
    timing: str
    offset: int
    saved_at: float
    flushes: int


class Due(msgspec.Struct, gc=False):
    """Timers that are due: their `keys`, the `ids` they were set for, and what of them is for `later`."""

    keys: list[bytes]
    ids: list[str]
    later: list[Timer]


class _Generation:
    """Records of a stretch of the changelog that ends at `offset`; `sealed_at` is when it ended, by the clock."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes | None] = {}
        self.offset = 0
        self.sealed_at = 0.0


_decode_position = msgspec.msgpack.Decoder(Position).decode
_decode_chunk = msgspec.msgpack.Decoder(list[tuple[int, str]]).decode


def entry_key(stream: str, prediction_id: str) -> bytes:
    """The key of an entry."""
    return f"e{stream}/{prediction_id}".encode()


def entity_key(stream: str, name: str) -> bytes:
    """The key of what is known of an entity."""
    return f"k{stream}/{name}".encode()


def entity_timers(stream: str) -> str:
    """Under which name an entity's timers are set: apart from those of predictions."""
    return f"{stream}#"


def progress_key(stream: str) -> bytes:
    """The key of a stream's progress in this partition."""
    return f"p{stream}".encode()


def split_entry_key(key: bytes) -> tuple[str, str]:
    """Stream and prediction id of an entry's key, or stream and entity of an entity's."""
    stream, _, prediction_id = key[1:].decode().partition("/")
    return stream, prediction_id


class State:
    """One partition's state. One thread at a time; `close` flushes it to disk.

    `progress` and `offset` are those of the changelog as far as it was saved or replayed. `younger_keys`, how many
    a generation holds, may be changed at any time.
    """

    progress: dict[str, Progress]
    offset: int
    _younger: _Generation
    _older: _Generation
    _timers: list[Timer]  # to be set with the next batch
    _fired: set[bytes]  # keys of timers to be removed with it
    _soonest: dict[str, int]  # nothing in memory is due before, by stream
    _timed: set[bytes]  # keys in memory that have a timer in the database or in `_timers`
    _flushes: int
    _flushed_at: float
    _broken: bool

    def __init__(
        self, path: Path, topic_id: str, contracts: Mapping[str, Contract], younger_keys: int = YOUNGER_KEYS
    ) -> None:
        """Open the cache at `path`, or make it anew (`offset` is then 0) when it cannot be trusted.

        It is dropped when it does not open, belongs to another topic, is too old, or has timers by other horizons.
        Raises StateBroken when a new one cannot be made, as on a full disk.
        """
        self._contracts = contracts
        self._topic_id = topic_id
        self._timing = str(
            sorted(
                (s, c.horizon_us, c.disorder_us, c.remember_us, str(c.label), str(c.join)) for s, c in contracts.items()
            )
        )
        self.younger_keys = younger_keys
        self._unlogged = WriteOptions()
        setattr(self._unlogged, "disable_wal", True)  # noqa: B010 - an attribute, whatever rocksdict's types say
        self._path = path
        self._forget_memory()
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

    def entries(self, keys: Collection[bytes]) -> dict[bytes, Entry | None]:
        """The entries of these keys."""
        return self._look_up(keys, unpack_entry)

    def entities(self, keys: Collection[bytes]) -> dict[bytes, Entity | None]:
        """What is known of the entities of these keys."""
        return self._look_up(keys, unpack_entity)

    def _look_up(self, keys: Collection[bytes], unpack: Callable[[bytes], Known]) -> dict[bytes, Known | None]:
        younger, older = self._younger.records, self._older.records
        # In order: neighbours share blocks.
        elsewhere: list[bytes] = sorted([key for key in keys if key not in younger and key not in older])
        found: dict[bytes, Known | None] = dict.fromkeys(elsewhere)
        with self._engine():
            values = cast(list[bytes | None], self._db.get([*elsewhere]) if elsewhere else [])
        for key, value in zip(elsewhere, values, strict=True):
            if value is not None:
                found[key] = unpack(value)
                self._timed.add(key)
        if len(elsewhere) < len(keys):
            for key in keys:
                if key not in found:
                    value = younger[key] if key in younger else older[key]
                    found[key] = None if value is None else unpack(value)
        return found

    def due(self, stream: str, watermark: int, limit: int) -> Due:
        """Timers that are due, earliest first, until they are for `limit` ids. What is in memory is written before."""
        if self._soonest.get(stream, _LAST) <= watermark:
            self.flush()
        prefix = _timer_prefix(stream)
        end = prefix + _sortable(watermark) + b"\xff"
        found = Due([], [], [])
        with self._engine():
            timers = self._db.iter()
            timers.seek(prefix)
            while timers.valid() and (key := timers.key()) <= end and len(found.ids) < limit:
                value = timers.value()
                timers.next()
                if key in self._fired:
                    continue
                chunk = _decode_chunk(value)
                split = bisect_right(chunk, watermark, key=lambda timer: timer[0])
                found.keys.append(key)
                found.ids += [prediction_id for _, prediction_id in chunk[:split]]
                found.later += [(stream, when, prediction_id) for when, prediction_id in chunk[split:]]
        return found

    def first_timed(self, stream: str, limit: int) -> tuple[list[str], int | None]:
        """The ids of about `limit` timers that are due first, and when the last of them is, as far as is written."""
        prefix = _timer_prefix(stream)
        ids: list[str] = []
        last: int | None = None
        with self._engine():
            timers = self._db.iter()
            timers.seek(prefix)
            while timers.valid() and timers.key().startswith(prefix) and len(ids) < limit:
                chunk = _decode_chunk(timers.value())
                ids += [prediction_id for _, prediction_id in chunk]
                last = chunk[-1][0]
                timers.next()
        return ids, last

    def save(
        self,
        records: Sequence[Record],
        offset: int,
        soonest: Mapping[str, int],
        timers: Sequence[Timer] = (),
        fired: Iterable[bytes] = (),
    ) -> None:
        """Take over what went to the changelog, which now ends at `offset`.

        New entries get a timer by themselves, when they are written; none of them is due before `soonest` of its
        stream. `timers` are set besides: of entries that were known and are due earlier, or whose timer `fired`.
        """
        self._younger.records.update(records)
        self._timers += timers
        self._fired.update(fired)
        for stream, when in soonest.items():
            self._soonest[stream] = min(when, self._soonest.get(stream, _LAST))
        for stream, when, prediction_id in timers:
            self._soonest[stream] = min(when, self._soonest.get(stream, _LAST))
            self._timed.add(_timed_key(stream, prediction_id))
        for key, value in records:
            if value is None:
                self._timed.discard(key)  # an entry that comes anew may be due before the timer of the one that is gone
            elif key.startswith(PROGRESS):
                self.progress[key[1:].decode()] = unpack_progress(value)
        self.offset = offset
        if time.monotonic() - self._flushed_at > _FLUSH_AFTER_S:
            self.flush()
        elif len(self._younger.records) >= self.younger_keys:
            self._age()

    def flush(self) -> None:
        """Write everything in memory to the database (which keeps it in its own memory for a while)."""
        self._older.records |= self._younger.records
        self._older.offset, self._older.sealed_at = self.offset, time.time()
        self._younger = _Generation()
        self._write_older()
        self._soonest.clear()
        self._timed.clear()

    def rebuild(self) -> None:
        """Forget everything: the changelog is to be replayed from its beginning."""
        self._db.close()
        self._make_anew()

    def close(self) -> None:
        """Write everything to disk and close; a broken cache is removed."""
        if not self._broken:
            self.flush()
            with self._engine():
                self._db.flush()
        self._db.close()
        if self._broken:
            shutil.rmtree(self._path, ignore_errors=True)

    def _age(self) -> None:
        """The older generation goes to the database, the younger one becomes the older."""
        self._write_older()
        self._older, self._younger = self._younger, _Generation()
        self._older.offset, self._older.sealed_at = self.offset, time.time()
        self._timed &= self._older.records.keys()

    def _write_older(self) -> None:
        """One batch: the older generation less what is newer in memory, all timers, and the position it stands for."""
        younger, records = self._younger.records, self._older.records
        self._flushes += 1
        batch = WriteBatch(raw_mode=True)
        for key in self._fired:
            batch.delete(key)
        new: list[Timer] = []
        for key in sorted([key for key in records if key not in younger]):  # ids of UUIDv7 are nearly so already
            value = records[key]
            if value is None:
                batch.delete(key)
                continue
            batch.put(key, value)
            if key not in self._timed and key.startswith((ENTRY, ENTITY)):
                stream, name = split_entry_key(key)
                contract = self._contracts.get(stream)
                if contract is None:
                    continue
                if key.startswith(ENTRY):
                    new.append((stream, due(unpack_entry(value), contract), name))
                else:
                    new.append((entity_timers(stream), by_entity.due(unpack_entity(value), contract), name))
        for key, chunk in _chunks([*new, *self._timers], self._flushes):
            batch.put(key, chunk)
        position = Position(self._topic_id, self._timing, self._older.offset, self._older.sealed_at, self._flushes)
        batch.put(CACHE, pack(position))
        with self._engine():
            self._db.write(batch, self._unlogged)
        self._older = _Generation()
        self._timers, self._fired = [], set()
        self._flushed_at = time.monotonic()

    @contextmanager
    def _engine(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._broken = True
            raise StateBroken(f"{self._path}: {exc}; it will be rebuilt from the changelog") from exc

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
            return "horizon, disorder, remember or label has changed"
        if not 0 <= time.time() - position.saved_at <= MAX_AGE_S:
            return f"it is older than {MAX_AGE_S // 3600} h, or the clock has gone back"
        self.offset = self._older.offset = position.offset
        self._older.sealed_at = position.saved_at
        self._flushes = position.flushes
        self.progress = {s: unpack_progress(value) for s, value in progress.items() if value is not None}
        return None

    def _make_anew(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        self._forget_memory()
        try:
            self._db = _open(self._path)
        except Exception as exc:
            raise StateBroken(f"{self._path} cannot be made: {exc}") from exc

    def _forget_memory(self) -> None:
        self.offset, self.progress, self._broken = 0, {}, False
        self._younger, self._older = _Generation(), _Generation()
        self._flushes, self._flushed_at = 0, time.monotonic()
        self._timers, self._fired, self._soonest, self._timed = [], set(), {}, set()


def _chunks(timers: list[Timer], flush: int) -> Iterator[tuple[bytes, bytes]]:
    """Timers as records of up to CHUNK_IDS ids of one stream, each keyed by the earliest."""
    by_stream: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for stream, when, prediction_id in timers:
        by_stream[stream].append((when, prediction_id))
    for stream, some in by_stream.items():
        some.sort()
        for number, first in enumerate(range(0, len(some), CHUNK_IDS)):
            chunk = some[first : first + CHUNK_IDS]
            key = _timer_prefix(stream) + _sortable(chunk[0][0]) + flush.to_bytes(8, "big") + number.to_bytes(4, "big")
            yield key, pack(chunk)


def _timed_key(stream: str, name: str) -> bytes:
    """The key of what a timer is for."""
    return entity_key(stream[:-1], name) if stream.endswith("#") else entry_key(stream, name)


def _timer_prefix(stream: str) -> bytes:
    """How the keys of a stream's timers begin; what follows sorts them by time."""
    return TIMER + stream.encode() + b"\0"


def _sortable(when: int) -> bytes:
    return min(max(when, 0), _LAST).to_bytes(8, "big")


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
    options.set_compression_type(DBCompressionType.lz4())
    options.set_keep_log_file_num(2)
    return Rdict(str(path), options)
