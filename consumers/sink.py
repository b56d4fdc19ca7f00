"""The sink: Kafka → Arrow → the lake, each record exactly once.

    while not stopping:
        records = read from Kafka until 50,000 records, 16 MB or a second
        tables  = the valid ones as Arrow
        in one lake transaction: append tables; move offsets, if they are still ours and where we think they are
        seal the windows that are complete

The lake holds the offsets: a process killed at any moment resumes where the last transaction ended, and one that was
believed dead cannot commit a batch twice. Whatever may heal (broker away, lake busy, offsets moved by another) ends in
the same place: everything is opened anew and reading goes on from the lake's offsets.

With a SQLite catalog it is the lake's one writer. With PostgreSQL any number of sinks share the topic-partitions; the
one that has the first partition of the predictions seals the windows.
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
from consumers.progress import Progress
from consumers.rows import arrow_tables, readers
from consumers.source import Source
from consumers.typed_views import make_typed_views
from consumers.windows import Sealer

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
                    _fill(TopicNames(config.topics.prefix), contracts, lake, source, stop, progress)
        except Transient as exc:
            pause = 0.5 if progress.commits > committed else min(2 * pause, _LONGEST_PAUSE_S)
            log.warning("%s; trying again in %.1f s", exc, pause)
            progress.trouble(str(exc))
            stop.wait(pause)


def _fill(
    names: TopicNames,
    contracts: Mapping[str, Contract],
    lake: WritableLake,
    source: Source,
    stop: threading.Event,
    progress: Progress,
) -> None:
    by_topic = readers(names, contracts)
    sealer = Sealer(lake, contracts, names)
    first = (names.predictions, 0)
    while not stop.is_set():
        if (at := source.at.get(first)) is not None:
            for window in sealer.seal(Move(*first, at, at)):
                log.info("sealed window %s of %s: %s rows", window["window"], window["stream"], window["rows"])
                progress.sealed(window["stream"])
        progress.turned()
        records = source.read(stop)
        if not records:
            continue
        started = time.monotonic()
        tables, skipped = arrow_tables(records, by_topic)
        moves, markers = source.moves(records)
        if markers := [m for m in markers if m["topic"] in (names.predictions, names.outcomes)]:
            tables["markers"] = pa.Table.from_pylist(markers, TABLES["markers"])
        if not lake.append(tables, moves):
            raise LakeUnavailable("topic-partitions of this sink were claimed or moved by another one")
        source.moved(moves)
        progress.committed(tables, skipped, moves, time.monotonic() - started)
        if strange := [record for record in skipped if record.own]:
            log.error("skipped %d records that no part of Accrual writes, such as %s", len(strange), strange[0])
        sealer.look_at(tables)
