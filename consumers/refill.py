"""Damaged files of the lake, written again from Kafka.

A file holds the rows of certain offsets (`files`, or the step of the sink that wrote it, say which), of one stream and
day. While the topic still has these records the file is written again at its place, with the same rows: the catalog
keeps it, so every snapshot and sealed window that names it is whole again, and no row is added or taken away. It is
done only if all its rows are found, to the last one; a run that is killed is simply repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing

import msgspec
import pyarrow as pa

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import BrokerUnavailable, LakeError
from accrual.kafka import Consumer, KafkaException, Message, TopicNames, TopicPartition, consumer
from accrual.lake import Lake, WritableLake
from accrual.lake_tables import TABLES
from accrual.lake_verify import CATALOG, DataFile, DataFolder, Found, Range, entry
from consumers.rows import arrow_tables, readers

# DuckLake's own column in a merged file, and its field id.
_SNAPSHOT_COLUMN, _SNAPSHOT_FIELD = "_ducklake_internal_snapshot_id", 2147483539
_PATIENCE_S = 30.0
_RANGES = pa.schema([("partition", pa.int32()), ("first", pa.int64()), ("last", pa.int64()), ("snapshot", pa.int64())])

log = logging.getLogger("accrual.refill")


class Refilled(msgspec.Struct, frozen=True):
    """What became of a damaged file: written again, or `why` not; `lost`: the offsets that no topic has any more."""

    table: str
    path: str
    rows: int
    why: str = ""
    lost: list[str] = []


class _NotPossibleError(Exception):
    """The message says why; `lost` which offsets no topic has any more."""

    def __init__(self, why: str, lost: Sequence[str] = ()) -> None:
        super().__init__(why)
        self.lost = list(lost)


def refill(
    config: Config, contracts: Mapping[str, Contract], lake: WritableLake, damaged: Sequence[Found]
) -> list[Refilled]:
    """Write the damaged files again, each that can be. Raises BrokerUnavailable, LakeUnavailable."""
    names = TopicNames(config.topics.prefix)
    folder = DataFolder(config)
    done = []
    with closing(consumer(config, f"{config.topics.prefix}.refill")) as topics:
        for file in (found.file for found in damaged):
            try:
                _refill(topics, names, contracts, lake, folder, file)
            except _NotPossibleError as exc:
                done.append(Refilled(file.table, file.path, file.rows, str(exc), exc.lost))
            except KafkaException as exc:
                raise BrokerUnavailable(f"reading what {file.path} held: {exc.args[0].str()}") from exc
            else:
                log.info("wrote %s again: %d rows", file.path, file.rows)
                done.append(Refilled(file.table, file.path, file.rows))
    return done


def _refill(
    topics: Consumer,
    names: TopicNames,
    contracts: Mapping[str, Contract],
    lake: WritableLake,
    folder: DataFolder,
    file: DataFile,
) -> None:
    topic = _topics(names).get(file.table)
    if topic is None or file.id is None:
        raise _NotPossibleError("its rows come from no topic")
    if file.thinned:
        raise _NotPossibleError("rows of it were deleted since, by their place in it")
    if file.encrypted:
        raise _NotPossibleError("it was encrypted with a key of its own")
    ranges = _ranges(lake, topic, file)
    records = _read(topics, topic, ranges)
    tables, _ = arrow_tables(records, readers(names, contracts))
    rows = _rows_of(lake, file, tables.get(file.table, TABLES[file.table].empty_table()), ranges)
    if len(rows) != file.rows:
        raise _NotPossibleError(
            f"it had {file.rows} rows, and the topic has {len(rows)} of them: erased, or read by another contract"
        )
    _write(lake, folder, file, rows, ranges)


def _topics(names: TopicNames) -> dict[str, str]:
    """Where the rows of each table come from."""
    return {
        "predictions": names.predictions,
        "outcomes": names.outcomes,
        "ticks": names.predictions,
        "ground_truth_history": names.ground_truth,
        "dead_letters": names.dead_letters,
        "generations": names.models,
        "runs": names.training,
        "evaluations": names.training,
    }


def _ranges(lake: Lake, topic: str, file: DataFile) -> list[Range]:
    """The offsets whose rows the file held: as recorded, or as the sink that wrote it moved with that commit."""
    if file.ranges is not None:
        return msgspec.json.decode(file.ranges, type=list[Range])
    if file.merged:
        raise _NotPossibleError("it was merged of several and not recorded yet")
    try:
        moves = lake.rows(
            'select "partition", first_offset as first, next_offset - 1 as last'
            f" from ducklake_table_insertions('lake', 'main', 'moves', {file.snapshot}, {file.snapshot})"
            " where topic = ? and next_offset > first_offset",
            [topic],
        )
    except LakeError as exc:
        raise _NotPossibleError(f"it was not recorded, and the sink's step is forgotten: {exc}") from exc
    return msgspec.convert(moves, list[Range])


def _read(topics: Consumer, topic: str, ranges: Sequence[Range]) -> list[Message]:
    """The records of these offsets. Raises _NotPossibleError if the topic no longer has some."""
    lost = []
    for wanted in ranges:
        low, high = topics.get_watermark_offsets(TopicPartition(topic, wanted.partition), timeout=10.0)
        if wanted.first < low:
            lost.append(f"{topic}[{wanted.partition}]@{wanted.first}..{min(wanted.last, low - 1)}")
        if wanted.last >= high:
            lost.append(f"{topic}[{wanted.partition}]@{max(wanted.first, high)}..{wanted.last}")
    if lost:
        raise _NotPossibleError("the topic no longer has its records", lost)
    records: list[Message] = []
    for partition in sorted({wanted.partition for wanted in ranges}):
        for first, last in _joined([wanted for wanted in ranges if wanted.partition == partition]):
            records += _read_range(topics, topic, partition, first, last)
    return records


def _read_range(topics: Consumer, topic: str, partition: int, first: int, last: int) -> list[Message]:
    topics.assign([TopicPartition(topic, partition, first)])
    records: list[Message] = []
    deadline = time.monotonic() + _PATIENCE_S
    at = first
    while at <= last:
        messages = topics.consume(num_messages=min(5_000, last + 1 - at), timeout=1.0)
        if not messages and time.monotonic() > deadline:
            raise BrokerUnavailable(f"{topic}[{partition}] gives nothing from offset {at} on")
        for message in messages:
            if message.error() is not None:
                continue  # the client reads on by itself
            deadline = time.monotonic() + _PATIENCE_S
            at = (message.offset() or 0) + 1
            if at - 1 <= last:
                records.append(message)
    return records


def _joined(ranges: Sequence[Range]) -> list[tuple[int, int]]:
    """Ranges of one partition that overlap or nearly touch, as one: each is a seek."""
    joined: list[tuple[int, int]] = []
    for wanted in sorted(ranges, key=lambda one: one.first):
        if joined and wanted.first <= joined[-1][1] + 1_000:
            joined[-1] = joined[-1][0], max(joined[-1][1], wanted.last)
        else:
            joined.append((wanted.first, wanted.last))
    return joined


def _rows_of(lake: Lake, file: DataFile, rows: pa.Table, ranges: Sequence[Range]) -> pa.Table:
    """Of the rows of these records those that the file held; where it was merged, with the snapshots they came with."""
    columns = rows.column_names
    partition = 'c."partition"' if "partition" in columns else "0"
    source = "candidates c"
    if "offset" in columns and file.table != "dead_letters":
        source += f' join ranges r on r."partition" = {partition} and c."offset" between r.first and r.last'
    if file.table == "ground_truth_history":
        source += ' anti join doubles d on d."partition" = c."partition" and d."offset" = c."offset"'
    values = [
        row["partition_value"]
        for row in lake.rows(
            f"select partition_value from {CATALOG}.ducklake_file_partition_value where data_file_id = ?"
            " order by partition_key_index",
            [file.id],
        )
    ]
    where = "stream is not distinct from ? and day::varchar is not distinct from ?" if values else "true"
    snapshot = f', r.snapshot as "{_SNAPSHOT_COLUMN}"' if file.merged else ""
    listed = pa.Table.from_pylist([msgspec.to_builtins(one) for one in ranges], _RANGES)
    with lake.with_tables({"candidates": rows, "ranges": listed}):
        return lake.arrow(f"select c.*{snapshot} from {source} where {where}", values)


def _write(lake: WritableLake, folder: DataFolder, file: DataFile, rows: pa.Table, ranges: Sequence[Range]) -> None:
    """Put the rows in the file's place, and its new size and digest into the catalog."""
    again = f"{file.path.removesuffix('.parquet')}.again.parquet"
    folder.make_parent(again)
    with lake.with_tables({"restored": rows}):
        [made] = lake.rows(
            f"copy (from restored) to '{folder.address}/{again}'"
            f" (format parquet, compression zstd, return_stats, field_ids {{{_field_ids(lake, file)}}})"
        )
    folder.files.move(again, file.path)
    lake.rows(
        f"update {CATALOG}.ducklake_data_file set file_size_bytes = ?, footer_size = ? where data_file_id = ?",
        [made["file_size_bytes"], made["footer_size_bytes"], file.id],
    )
    recorded = entry(lake, folder, file, msgspec.json.encode(ranges).decode())
    with lake.transaction():
        lake.rows("delete from lake.files where path = ?", [file.path])
        lake.add({"files": pa.Table.from_pylist([recorded], TABLES["files"])}, [])


def _field_ids(lake: Lake, file: DataFile) -> str:
    """The catalog's ids of the columns, by which a reader finds them, as COPY takes them."""
    columns = lake.rows(
        f"select column_id as id, column_name as name, parent_column as parent from {CATALOG}.ducklake_column"
        f" where end_snapshot is null and table_id = (select table_id from {CATALOG}.ducklake_data_file"
        " where data_file_id = ?)",
        [file.id],
    )
    inner = {column["parent"]: column["id"] for column in columns}
    ids = {
        column["name"]: f"{{__duckdb_field_id: {column['id']}, element: {inner[column['id']]}}}"
        if column["id"] in inner
        else str(column["id"])
        for column in columns
        if column["parent"] is None
    }
    if file.merged:
        ids[_SNAPSHOT_COLUMN] = str(_SNAPSHOT_FIELD)
    return ", ".join(f'"{name}": {id_}' for name, id_ in ids.items())
