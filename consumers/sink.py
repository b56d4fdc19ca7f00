"""The sink: Kafka → Arrow → the lake, each record exactly once.

    while not stopping:
        records = read from Kafka until 50,000 records, 16 MB or a second
        tables  = the valid ones as Arrow
        set apart the ground truth that came twice
        in one lake transaction: append tables; move offsets, if they are still ours and where we think they are
        seal the windows that are complete

The lake holds the offsets: a process killed at any moment resumes where the last transaction ended, and one that was
believed dead cannot commit a batch twice. Whatever may heal (broker away, lake busy, offsets moved by another) ends in
the same place: everything is opened anew and reading goes on from the lake's offsets.

With a SQLite catalog it is the lake's one writer. With PostgreSQL any number of sinks share the topic-partitions; the
one that has the first partition of the predictions seals the windows and, when it keeps up
with what comes, keeps the lake small.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import pyarrow as pa

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import LakeUnavailable, Transient
from accrual.kafka import TopicNames
from accrual.lake import Move, WritableLake, open_lake_for_writing
from accrual.lake_tables import TABLES
from consumers.doubles import Doubles
from consumers.keeper import Keeper
from consumers.progress import Progress
from consumers.rows import Reader, Skipped, arrow_tables, readers
from consumers.source import Source
from consumers.typed_views import make_typed_views
from consumers.windows import Sealer

BATCH_RECORDS = 50_000
BATCH_BYTES = 16 * 2**20
BATCH_SECONDS = 1.0
_LONGEST_PAUSE_S = 15.0

log = logging.getLogger("accrual.sink")


def run(config: Config, contracts: Mapping[str, Contract], stop: threading.Event, progress: Progress) -> None:
    """Fill the lake until `stop` is set; then the batch in hand is finished first.

    Waits out whatever is Transient, with growing pauses. Raises LakeLocked if another process is the one writer,
    TopicMismatch if topics are missing or were recreated under the lake.
    """
    pause = 0.5
    while not stop.is_set():
        committed = progress.commits
        try:
            with open_lake_for_writing(config) as lake:
                make_typed_views(lake, contracts)
                with Source(config, lake, progress) as source:
                    _fill(config, contracts, lake, source, stop, progress)
        except Transient as exc:
            pause = 0.5 if progress.commits > committed else min(2 * pause, _LONGEST_PAUSE_S)
            log.warning("%s; trying again in %.1f s", exc, pause)
            progress.trouble(str(exc))
            stop.wait(pause)


def _fill(
    config: Config,
    contracts: Mapping[str, Contract],
    lake: WritableLake,
    source: Source,
    stop: threading.Event,
    progress: Progress,
) -> None:
    names = TopicNames(config.topics.prefix)
    by_topic = readers(names, contracts)
    sealer = Sealer(lake, contracts, names)
    keeper = Keeper(lake, config)
    doubles = Doubles(lake)
    first, quiet = (names.predictions, 0), True
    while not stop.is_set():
        if (at := source.at.get(first)) is not None:
            for window in sealer.seal(Move(*first, at, at)):
                log.info("sealed window %s of %s: %s rows", window["window"], window["stream"], window["rows"])
                progress.sealed(window["stream"])
            if quiet:
                keeper.maintain_if_due()
        progress.turned()
        batch = _read_batch(source, by_topic, stop)
        if batch is None:
            quiet = True
            continue
        started = time.monotonic()
        tables, skipped = batch
        moves = source.moves()
        emitted = [move for move in moves if move.topic == names.ground_truth]
        tables |= doubles.set_apart(tables.get("ground_truth_history"), emitted)
        if markers := [m for m in source.markers() if m["topic"] in (names.predictions, names.outcomes)]:
            tables["markers"] = pa.Table.from_pylist(markers, TABLES["markers"])
        if not lake.append(tables, moves):
            raise LakeUnavailable("topic-partitions of this sink were claimed or moved by another one")
        source.moved()
        quiet = sum(move.next - move.expected for move in moves) < BATCH_RECORDS // 2
        progress.committed(tables, skipped, moves, time.monotonic() - started)
        if strange := [record for record in skipped if record.own]:
            log.error("skipped %d records that no part of Accrual writes, such as %s", len(strange), strange[0])
        sealer.look_at(tables)


def _read_batch(
    source: Source, by_topic: Mapping[str, Reader], stop: threading.Event
) -> tuple[dict[str, pa.Table], list[Skipped]] | None:
    """The rows of a batch by table, and what was left out; None if no record came, or others are dealt.

    Records become Arrow columns as they come: a batch of them would take ten times the memory.
    """
    parts: dict[str, list[pa.Table]] = {}
    skipped: list[Skipped] = []
    count = size = 0
    until = time.monotonic() + BATCH_SECONDS
    while not stop.is_set() and count < BATCH_RECORDS and size < BATCH_BYTES:
        left = until - time.monotonic()
        if left <= 0:
            break
        records = source.read(min(left, 0.25))
        if records is None:
            return None
        tables, left_out = arrow_tables(records, by_topic)
        for table, rows in tables.items():
            parts.setdefault(table, []).append(rows)
            size += rows.nbytes
        skipped += left_out
        count += len(records)
    return ({table: pa.concat_tables(rows) for table, rows in parts.items()}, skipped) if count else None
