"""Erasure: every row of one person or thing is removed from the lake, from its history, and from the disk.

    find      the predictions meant, and with them every row of every table that holds what they said
    delete    these rows, and record in `erasures` that they were there, in one transaction
    rewrite   the files they were in; forget every snapshot from before; delete the files of these
    prove     read all that is left (accrual/erasure_proof.py)

Erasure wins over history: no snapshot from before it is left, of any stream, and sealed windows are read from then on
as they were after it. Every step may be repeated: one that was cut short is finished by the same call again.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import LakeConflict, LakeUnavailable, NotFound
from accrual.kafka import TopicNames
from accrual.lake import Lake, WritableLake, json_path, retried
from accrual.lake_tables import TABLES
from accrual.pii import pseudonym_of

# A file that no commit knows may belong to one that another sink is making: none takes so long.
_IN_FLIGHT = timedelta(hours=1)
_JUDGED = "('conflicting_prediction', 'too_old', 'late', 'orphan')"  # such a letter has its record in the lake too

# The predictions meant, in the temporary tables `ids` and `entities`. Where outcomes name an entity they cannot be told
# apart by prediction, so all that was predicted for an entity goes together.
_IDS = """
create or replace temp table ids as
with meant as (select prediction_id, entity from predictions where stream = $stream and {meant}),
keys as (select entity from meant where entity is not null union select unnest($entities::varchar[]))
select distinct prediction_id from (
    select prediction_id from meant
    union all select p.prediction_id from predictions p join keys using (entity) where p.stream = $stream
    union all select unnest($ids::varchar[])
)
"""
_ENTITIES = """
create or replace temp table entities as
select entity from predictions where stream = $stream and entity is not null
    and prediction_id in (select prediction_id from ids)
union select unnest($entities::varchar[])
"""
_IN_IDS = "stream = $stream and prediction_id in (select prediction_id from ids)"
_OUTCOMES = f"({_IN_IDS} or stream = $stream and entity in (select entity from entities))"
# A letter of one of their records; or whose bytes name one of them, or the subject, as JSON writes a text.
_LETTERS = f"""(({_IN_IDS})
    or (stream is null or stream = $stream) and (
        key in (select encode(prediction_id) from ids) or key in (select encode(entity) from entities)
        or exists (select 1 from positions p where p.topic = t.topic and p."partition" = t."partition"
                   and p."offset" = t."offset")
        or list_bool_or(list_transform($marks::varchar[], lambda mark: contains(value::varchar, encode(mark)::varchar)))
    ))"""
_POSITIONS = f"""
create or replace temp table positions as
select $predictions as topic, "partition", "offset" from predictions where {_IN_IDS}
union all select $outcomes, "partition", "offset" from outcomes where {_OUTCOMES}
"""


class Subject(msgspec.Struct, frozen=True):
    """Whose rows: those of `stream` whose `by` (`prediction_id`, `entity` or `inputs.FIELD`) is one of `texts`.

    `texts` are what was asked for and its pseudonym, where the contract has one; `names` are all of the field's.
    """

    stream: str
    by: str
    texts: list[str]
    names: list[str] = []


class Taught(msgspec.Struct, frozen=True):
    """A generation that was trained on windows which held rows of the subject."""

    model: str
    windows: list[int]
    published_at: datetime


class Found(msgspec.Struct, frozen=True):
    """What the lake holds of a subject: rows of each table that has any, their sealed windows, and who learned of them.

    `pending` predictions have no label yet: the join still knows them, and they come again when it does.
    `arrived`: by topic, when the last of the records arrived that hold them.
    """

    rows: dict[str, int]
    ids: list[str]
    entities: list[str]
    windows: list[int]
    generations: list[Taught]
    pending: int
    arrived: dict[str, datetime]


def subject_of(config: Config, contract: Contract, subject: str, by: str) -> Subject:
    """Who is meant. Raises NotFound for a field that the contract does not have, ConfigError without `pii.key`."""
    texts, names = [subject], []
    pseudonym = pseudonym_of(config.pii.key)(subject)  # the record of an erasure needs the key in any case
    if by == "entity" and contract.join is not None and contract.join.pseudonymise:
        texts.append(pseudonym)
    elif by.startswith("inputs."):
        field = contract.inputs.get(by.removeprefix("inputs."))
        if field is None:
            raise NotFound(f"stream '{contract.stream}' has no {by}; its inputs are {', '.join(contract.inputs)}")
        names = [by.removeprefix("inputs."), *field.names_before]
        texts += [pseudonym] if field.pii == "pseudonymise" else []
    elif by not in ("prediction_id", "entity"):
        raise NotFound(f"rows are found by prediction_id, entity or inputs.FIELD, and not by '{by}'")
    return Subject(contract.stream, by, texts, names)


def digest_of(config: Config) -> Callable[[str], str]:
    """How the record of an erasure names an id or a subject: not by the pseudonym that rows have."""
    keyed = pseudonym_of(config.pii.key)
    return lambda text: keyed(f"erased {text}")


def find(lake: Lake, names: TopicNames, subject: Subject) -> Found:
    """Everything the lake holds of the subject now. Leaves temporary tables for `delete`."""
    asked = _asked(names, subject)
    meant = {
        "prediction_id": "prediction_id in (select unnest($texts::varchar[]))",
        "entity": "entity in (select unnest($texts::varchar[]))",
    }.get(subject.by, "len(list_intersect(json_extract_string(inputs, $paths::varchar[]), $texts::varchar[])) > 0")
    by_id = subject.by == "prediction_id"
    _run(lake, _IDS.format(meant=meant), asked | {"ids": subject.texts if by_id else []})
    _run(lake, _ENTITIES, asked)
    ids = [row["prediction_id"] for row in lake.rows("from ids order by all")]
    asked |= {"marks": _marks([*subject.texts, *ids])}
    _run(lake, _POSITIONS, asked)
    counts = {
        table: _run(lake, f'select count(*) as n from "{table}" t where {w}', asked)[0]["n"] for table, w in _held()
    }
    windows = _run(
        lake,
        'select distinct w."window" from windows w join predictions p on p.stream = w.stream'
        f" and p.predicted_at >= w.from_time and p.predicted_at < w.to_time where p.{_IN_IDS} order by all",
        asked,
    )
    touched = [row["window"] for row in windows]
    taught = lake.rows(
        "select model, list_sort(list_intersect(windows, ?::int[])) as windows, published_at from generations"
        " where stream = ? and list_has_any(windows, ?::int[]) order by version",
        [touched, subject.stream, touched],
    )
    pending = _run(
        lake,
        "select count(distinct prediction_id) as n from predictions p"
        f" where {_IN_IDS} and prediction_id not in (select prediction_id from ground_truth_history where {_IN_IDS})",
        asked,
    )
    arrived = {
        topic: _run(lake, f'select max(arrived_at) as t from "{table}" t where {dict(_held())[table]}', asked)[0]["t"]
        for topic, table in (
            (names.predictions, "predictions"),
            (names.outcomes, "outcomes"),
            (names.ground_truth, "ground_truth_history"),
            (names.dead_letters, "dead_letters"),
        )
    }
    return Found(
        rows={table: count for table, count in counts.items() if count},
        ids=ids,
        entities=[row["entity"] for row in lake.rows("from entities order by all")],
        windows=touched,
        generations=msgspec.convert(taught, list[Taught]),
        pending=pending[0]["n"],
        arrived={topic: at for topic, at in arrived.items() if at is not None},
    )


def erase(lake: WritableLake, config: Config, subject: Subject) -> Found:
    """Remove everything the lake holds of the subject; returns what that was.

    Raises LakeConflict if other writers were faster again and again: whatever is added to a table while rows of it are
    deleted makes the deletion begin anew.
    """
    try:
        found = retried(lambda: _delete(lake, config, subject))
    except LakeConflict as exc:
        raise LakeConflict(
            f"sinks commit faster than rows are deleted: stop them, then run this again ({exc})"
        ) from exc
    for table, _ in _held():
        rewrite = f"call ducklake_rewrite_data_files('lake', '{table}', delete_threshold => 0)"
        retried(partial(lake.rows, rewrite))
    retried(lambda: _forget(lake))
    return found


def _delete(lake: WritableLake, config: Config, subject: Subject) -> Found:
    """The rows, and the record that they were there: which record each was, and of whom by keyed digests."""
    names, digest = TopicNames(config.topics.prefix), digest_of(config)
    with lake.transaction():
        found = find(lake, names, subject)
        if not found.rows:
            return found
        asked = _asked(names, subject) | {
            "marks": _marks([*subject.texts, *found.ids]),
            "erasure": uuid.uuid4().hex,
            "subject": digest(subject.texts[0]),
            "now": datetime.now(UTC),
        }
        columns = [found.ids, [digest(prediction_id) for prediction_id in found.ids]]
        digests = pa.table([pa.array(column, pa.string()) for column in columns], names=["id", "digest"])
        with lake.with_tables({"digests": digests}):
            for table, condition in _held():
                if table in found.rows:
                    _run(lake, _record(table, condition), asked)
        for table, condition in _held():
            if table in found.rows:
                _run(lake, f'delete from lake."{table}" t where {condition}', asked)
    return found


def _record(table: str, condition: str) -> str:
    """The statement that records the rows of a table which are about to go.

    `topic` only where the row stands for a record of raw events; `moment` only where no other of its partition is
    later: how far event time has come must still be known.
    """
    columns = TABLES[table].names
    moment = {"predictions": "predicted_at", "outcomes": "observed_at"}.get(table)
    day = "day" if "day" in columns else "arrived_at::date" if "arrived_at" in columns else "null::date"
    topic = {"predictions": "$predictions", "outcomes": "$outcomes"}.get(table, "null")
    if table == "dead_letters":
        topic = f"case when reason not in {_JUDGED} and topic in ($predictions, $outcomes) then topic end"
    latest = (
        f'case when {moment} = (select max({moment}) from lake."{table}" l where l.stream = t.stream'
        f' and l."partition" = t."partition") then {moment} end'
        if moment
        else "null::timestamptz"
    )
    window = (
        '(select min(w."window") from windows w where w.stream = t.stream'
        " and t.predicted_at >= w.from_time and t.predicted_at < w.to_time)"
        if "predicted_at" in columns
        else "null::int"
    )
    none = 'null::int as "partition", null::bigint as "offset"'
    position = '"partition", "offset"' if "partition" in columns else none
    return f"""
        insert into lake.erasures by name
        select $erasure as erasure, coalesce(stream, '') as stream, '{table}' as "table", {day} as day,
            {topic} as topic, {position}, {latest} as moment, {window} as "window",
            (select digest from digests where id = t.prediction_id) as prediction, $subject as subject, $now as "at"
        from "{table}" t where {condition}
    """


def _forget(lake: WritableLake) -> None:
    """Windows name the snapshot after the erasure; those before it go, and every file that no snapshot needs."""
    with lake.transaction():
        newest = lake.snapshot_id()
        lake.rows(f"update lake.windows set snapshot_id = {newest} where snapshot_id < {newest}")
    lake.rows("call ducklake_rewrite_data_files('lake', 'windows', delete_threshold => 0)")
    before = [row["snapshot_id"] for row in lake.rows("from ducklake_snapshots('lake')") if row["snapshot_id"] < newest]
    if before:
        lake.rows(f"call ducklake_expire_snapshots('lake', versions => {before})")
    lake.rows("call ducklake_cleanup_old_files('lake', cleanup_all => true)")
    which = "cleanup_all => true" if lake.alone else f"older_than => timestamptz '{datetime.now(UTC) - _IN_FLIGHT}'"
    lake.rows(f"call ducklake_delete_orphaned_files('lake', {which})")
    lake.rows(_TABLE_STATISTICS)


# The least and greatest text of a column may be one that is gone: anew, from those of the files that are left, or
# null, for unknown, where none is.
_TABLE_STATISTICS = """
update __ducklake_metadata_lake.ducklake_table_column_stats set
    min_value = (
        select min(f.min_value) from __ducklake_metadata_lake.ducklake_file_column_stats f
        where f.table_id = ducklake_table_column_stats.table_id and f.column_id = ducklake_table_column_stats.column_id
    ),
    max_value = (
        select max(f.max_value) from __ducklake_metadata_lake.ducklake_file_column_stats f
        where f.table_id = ducklake_table_column_stats.table_id and f.column_id = ducklake_table_column_stats.column_id
    )
where (table_id, column_id) in (
    select table_id, column_id from __ducklake_metadata_lake.ducklake_column where column_type in ('varchar', 'blob')
)
"""


def compact_catalog(config: Config) -> None:
    """Overwrite what a SQLite catalog deleted: its file keeps such bytes until then. PostgreSQL has `VACUUM FULL`.

    Raises LakeUnavailable while a reader is in the way.
    """
    if not config.lake_catalog.startswith("sqlite:"):
        return
    connection = sqlite3.connect(Path(config.lake_catalog.removeprefix("sqlite:")), timeout=30, isolation_level=None)
    try:
        connection.execute("vacuum")
        busy, *_ = connection.execute("pragma wal_checkpoint(truncate)").fetchone()
    except sqlite3.OperationalError as exc:
        raise LakeUnavailable(f"the catalog cannot be compacted while others read it ({exc}): run this again") from exc
    finally:
        connection.close()
    if busy:
        raise LakeUnavailable("the catalog cannot be compacted while others read it: run this again")


def _held() -> list[tuple[str, str]]:
    """Every table that holds what a prediction or an outcome said, and which of its rows are the subject's."""
    special = {"outcomes": _OUTCOMES, "dead_letters": _LETTERS}
    return [
        (name, special.get(name, _IN_IDS))
        for name, schema in TABLES.items()
        if "prediction_id" in schema.names and "stream" in schema.names
    ]


def _asked(names: TopicNames, subject: Subject) -> dict[str, Any]:
    return {
        "stream": subject.stream,
        "texts": subject.texts,
        "paths": [json_path(name) for name in subject.names],
        "entities": subject.texts if subject.by == "entity" else [],
        "predictions": names.predictions,
        "outcomes": names.outcomes,
    }


def _marks(texts: Sequence[str]) -> list[str]:
    """How JSON writes these texts, with and without escapes for other alphabets."""
    return sorted({json.dumps(text, ensure_ascii=ascii_only) for text in texts for ascii_only in (True, False)})


def _run(lake: Lake, sql: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a statement with those of the parameters that it names."""
    return lake.rows(sql, {name: value for name, value in asked.items() if f"${name}" in sql})
