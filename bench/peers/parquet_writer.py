"""The least a sink can do: Kafka records into Parquet files with pyarrow, at least once.

python bench/peers/parquet_writer.py GROUP FOLDER    with Accrual's configuration in ACCRUAL_* variables, until SIGTERM

A file a topic and batch holds the columns that every record has, its JSON unread; offsets are committed after the
files. No catalog, no checks, no types, nothing that keeps a record from coming twice.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from accrual.config import load_config
from accrual.kafka import Message, TopicNames, consumer

BATCH_RECORDS, BATCH_SECONDS = 50_000, 1.0
SCHEMA = pa.schema(
    [
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("at", pa.int64()),
    ]
)


def main() -> None:
    """Write until terminated."""
    config = load_config()
    names = TopicNames(config.topics.prefix)
    folder = Path(sys.argv[2])
    reader = consumer(config, sys.argv[1], **{"enable.auto.offset.store": True, "fetch.min.bytes": 65_536})
    reader.subscribe([names.predictions, names.outcomes])
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: ended.append(number))
    for number in itertools.count():
        if ended:
            break
        batch: list[Message] = []
        until = time.monotonic() + BATCH_SECONDS
        while len(batch) < BATCH_RECORDS and (left := until - time.monotonic()) > 0 and not ended:
            batch += reader.consume(5_000, min(left, 0.25))
        for topic in (names.predictions, names.outcomes):
            if rows := [m for m in batch if m.topic() == topic]:
                values = ((m.key(), m.value(), m.partition(), m.offset(), m.timestamp()[1]) for m in rows)
                columns = [pa.array(c, f.type) for c, f in zip(zip(*values, strict=True), SCHEMA, strict=True)]
                pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"{topic}-{number}.parquet")
        if batch:
            reader.commit(asynchronous=False)
    reader.close()


if __name__ == "__main__":
    main()
