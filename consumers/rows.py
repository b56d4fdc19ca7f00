"""Kafka records as Arrow tables of the lake. No I/O.

A raw event that breaks its contract is left out: the join reads the same bytes with the same function and makes a dead
letter of it, which arrives here through the dead-letters topic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pyarrow as pa

from accrual.contract import Contract
from accrual.errors import Rejected
from accrual.events import NULL, Tick, decode_dead_letter, decode_ground_truth, timed_outcome, timed_prediction
from accrual.kafka import Message, TopicNames
from accrual.lake_tables import TABLES, TIME
from accrual.ledger import Decision, Evaluation, Run, decode_generation, decode_ledger_entry

_LEDGER_TABLES: dict[type, str] = {Run: "runs", Evaluation: "evaluations", Decision: "quarantine"}
_MILLISECONDS = pa.timestamp("ms", "UTC")
Row = tuple[Any, ...]
# From one record to its table and its values, in the order of the table's columns without `day`.
Reader = Callable[[Message], tuple[str, Row]]


def readers(names: TopicNames, contracts: Mapping[str, Contract]) -> dict[str, Reader]:
    """How each topic's records are read. A reader raises Rejected or msgspec.DecodeError, nothing else."""

    def prediction(m: Message) -> tuple[str, Row]:
        arrived = m.timestamp()[1]
        e, at = timed_prediction(m.value(), m.key(), arrived, contracts)
        place = m.partition(), m.offset(), arrived
        if isinstance(e, Tick):
            return "ticks", (e.tick, at, *place)
        payload = (e.stream, e.prediction_id, e.model, at, bytes(e.inputs), bytes(e.output), e.entity)
        return "predictions", (*payload, *place)

    def outcome(m: Message) -> tuple[str, Row]:
        arrived = m.timestamp()[1]
        e, at = timed_outcome(m.value(), m.key(), arrived, contracts)
        place = m.partition(), m.offset(), arrived
        return "outcomes", (e.stream, e.prediction_id, at, bytes(e.values), e.source, e.entity, *place)

    def ground_truth(m: Message) -> tuple[str, Row]:
        e = decode_ground_truth(_value(m))
        payload = (e.stream, e.prediction_id, e.revision, e.status, e.label, e.model, e.predicted_at, e.observed_at)
        values = None if e.values == NULL else bytes(e.values)
        rest = (bytes(e.inputs), bytes(e.output), values, e.source, e.entity)
        return "ground_truth_history", (*payload, *rest, m.partition(), m.offset(), m.timestamp()[1])

    def dead_letter(m: Message) -> tuple[str, Row]:
        e = decode_dead_letter(_value(m))
        source = (e.reason, e.detail, e.topic, e.partition, e.offset, e.key, e.value, e.stream, e.prediction_id)
        return "dead_letters", (*source, m.timestamp()[1])

    def generation(m: Message) -> tuple[str, Row]:
        return "generations", _ledger_row("generations", decode_generation(_value(m)), m.offset())

    def ledger_entry(m: Message) -> tuple[str, Row]:
        entry = decode_ledger_entry(_value(m))
        table = _LEDGER_TABLES[type(entry)]
        return table, _ledger_row(table, entry, m.offset())

    return {
        names.predictions: prediction,
        names.outcomes: outcome,
        names.ground_truth: ground_truth,
        names.dead_letters: dead_letter,
        names.models: generation,
        names.training: ledger_entry,
    }


class Skipped(msgspec.Struct, frozen=True):
    """A record that became no row. `own` if the topic is one that only Accrual writes: then someone should look."""

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    own: bool


def arrow_tables(
    records: Sequence[Message], by_topic: Mapping[str, Reader]
) -> tuple[dict[str, pa.Table], list[Skipped]]:
    """The rows of `records` by table, and what was left out."""
    rows: dict[str, list[Row]] = {}
    sources: dict[str, list[Message]] = {}
    skipped: list[Skipped] = []
    for record in records:
        try:
            table, row = by_topic[record.topic() or ""](record)
        except Rejected as exc:
            skipped.append(_skipped(record, exc.reason, exc.detail, own=False))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            skipped.append(_skipped(record, "unreadable", str(exc), own=True))
        else:
            if table not in rows:
                rows[table], sources[table] = [], []
            rows[table].append(row)
            sources[table].append(record)
    return {table: _table(table, rows[table], sources[table], skipped) for table in rows}, skipped


def _skipped(record: Message, reason: str, detail: str, own: bool) -> Skipped:
    return Skipped(record.topic() or "", record.partition() or 0, record.offset() or 0, reason, detail, own)


def _table(name: str, rows: list[Row], sources: list[Message], skipped: list[Skipped]) -> pa.Table:
    """All rows as one table, without those that hold a value no column can (a hand-written revision of 2^40)."""
    try:
        return _columns(name, rows)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as exc:
        if len(rows) == 1:
            skipped.append(_skipped(sources[0], "unreadable", str(exc), own=True))
            return TABLES[name].empty_table()
        half = len(rows) // 2
        first = _table(name, rows[:half], sources[:half], skipped)
        return pa.concat_tables([first, _table(name, rows[half:], sources[half:], skipped)])


def _columns(name: str, rows: list[Row]) -> pa.Table:
    schema = TABLES[name]
    arrays: dict[str, pa.Array] = {}
    fields = [field for field in schema if field.name != "day"]
    for field, values in zip(fields, zip(*rows, strict=True), strict=True):
        if field.name == "arrived_at":
            arrays[field.name] = pa.array(values, _MILLISECONDS).cast(TIME)
        else:
            arrays[field.name] = pa.array(values, field.type)
    if "day" in schema.names:
        moment = "observed_at" if name == "outcomes" else "predicted_at"
        arrays["day"] = arrays[moment].cast(pa.date32())
    return pa.table([arrays[field.name] for field in schema], schema=schema)


def _value(m: Message) -> bytes:
    """The record's value; one without (a tombstone nobody of ours writes) is no event."""
    value = m.value()
    if value is None:
        raise msgspec.DecodeError("the record has no value")
    return value


def _ledger_row(table: str, entry: msgspec.Struct, offset: int | None) -> Row:
    """An entry's fields in the order of the columns; what is nested where the column is text becomes JSON."""
    row: list[Any] = []
    for column in TABLES[table]:
        value = offset if column.name == "offset" else getattr(entry, column.name)
        nested = isinstance(value, list | dict) and pa.types.is_string(column.type)
        row.append(msgspec.json.encode(value).decode() if nested else value)
    return tuple(row)
