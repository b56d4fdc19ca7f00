"""The proof of an erasure: everything that is left is read, and nothing of the subject may be in it.

- Every row of every table, through the lake, at its newest snapshot.
- Every file under the data folder, whatever the catalog knows of it: its rows, deleted ones too, the least and
  greatest values in its footer, and its bytes. Files of an encrypted lake can be read with the catalog's keys only:
  those that it lists are read through the lake, any other one counts as found.
- The texts in the catalog's tables, and the bytes of its file with SQLite.

Ids, keys and pseudonyms are looked for as whole values, and as JSON writes them inside longer ones. The plain text of
an input may be anybody's (a name, a city): where it is left, that is a mention, for a person to look at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from accrual.config import Config
from accrual.erasure import Found, Subject
from accrual.errors import LakeError
from accrual.lake import open_lake
from accrual.lake_tables import TABLES

_AT_ONCE = 500  # in one regular expression
_LEAST_BYTES = 8  # shorter texts turn up in bytes by chance
_CATALOG = (
    "data_file",
    "delete_file",
    "file_column_stats",
    "file_partition_value",
    "files_scheduled_for_deletion",
    "metadata",
    "snapshot_changes",
    "table_column_stats",
    "tag",
)


class Trace(msgspec.Struct, frozen=True):
    """Something of the subject that is left: where, and in how many places there."""

    where: str
    places: int


class Proof(msgspec.Struct, frozen=True):
    """What was read, and what was found in it."""

    rows: int
    files: int
    bytes: int
    traces: list[Trace]
    mentions: list[Trace]

    @property
    def clean(self) -> bool:
        """Whether nothing of the subject is left."""
        return not self.traces


def prove(config: Config, subject: Subject, found: Found) -> Proof:
    """Read all of the lake for what `found` was. Raises LakeUnavailable."""
    plain = {subject.texts[0]} if subject.names else set()
    marks, mentioned = Marks({*found.ids, *found.entities, *subject.texts} - plain), Marks(plain)
    traces: list[Trace] = []
    mentions: list[Trace] = []
    rows = size = 0
    with open_lake(config) as lake:
        listed: set[str] = set()
        for table in TABLES:
            there = maybe = 0
            for batch in lake.batches(f'from lake."{table}"'):
                rows, there, maybe = (
                    rows + batch.num_rows,
                    there + marks.in_rows(batch),
                    maybe + mentioned.in_rows(batch),
                )
            _note(traces, f"table {table}", there)
            _note(mentions, f"table {table}", maybe)
            listed |= {r["data_file"] for r in lake.rows(f"from ducklake_list_files('lake', '{table}')")}
        for row in lake.rows(
            "from ducklake_snapshots('lake') where snapshot_id > 0"
        ):  # windows were changed after what they name
            at = f"snapshot_version => {row['snapshot_id']}"
            listed |= {r["data_file"] for r in lake.rows(f"from ducklake_list_files('lake', 'windows', {at})")}
        files = [row["file"] for row in lake.rows("from glob(?)", [f"{config.lake_data.rstrip('/')}/**"])]
        for file in files:
            [row] = lake.rows("select content from read_blob(?)", [file])
            size += len(row["content"])
            _note(traces, f"bytes of {file}", marks.in_bytes(row["content"]))
            try:
                for query in (
                    "from read_parquet(?)",
                    "select stats_min_value, stats_max_value from parquet_metadata(?)",
                ):
                    _note(
                        traces, f"rows or footer of {file}", sum(marks.in_rows(b) for b in lake.batches(query, [file]))
                    )
            except LakeError as exc:
                if file not in listed or "encrypted" not in str(exc):
                    _note(traces, f"{file} cannot be read: {exc}", 1)
        for name in _CATALOG:
            query = f"from __ducklake_metadata_lake.ducklake_{name}"
            _note(traces, f"catalog, ducklake_{name}", sum(marks.in_rows(b) for b in lake.batches(query)))
    if config.lake_catalog.startswith("sqlite:"):
        catalog = Path(config.lake_catalog.removeprefix("sqlite:"))
        for path in (catalog, catalog.with_name(f"{catalog.name}-wal")):
            if path.is_file():
                _note(traces, f"bytes of {path}", marks.in_bytes(path.read_bytes()))
    return Proof(rows, len(files), size, traces, mentions)


class Marks:
    """Texts to be found in what is left."""

    def __init__(self, texts: set[str]) -> None:
        self._texts = sorted(texts)
        self._whole = pa.array(self._texts, pa.string())
        self._whole_bytes = self._whole.cast(pa.binary())
        quoted = sorted({json.dumps(t, ensure_ascii=ascii_only) for t in texts for ascii_only in (True, False)})
        self._inside = [_either(quoted[at : at + _AT_ONCE]) for at in range(0, len(quoted), _AT_ONCE)]
        self._long = [encoded for text in self._texts if len(encoded := text.encode()) >= _LEAST_BYTES]

    def in_rows(self, batch: pa.RecordBatch) -> int:
        """How many values hold one of the texts."""
        if not self._texts:
            return 0
        count = 0
        for column in batch.columns:
            if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
                continue
            whole = self._whole if pa.types.is_string(column.type) else self._whole_bytes
            hits = pc.is_in(column, value_set=whole)
            for pattern in self._inside:
                hits = pc.or_(hits, pc.fill_null(pc.match_substring_regex(column, pattern), False))
            count += pc.sum(hits).as_py() or 0
        return count

    def in_bytes(self, content: bytes) -> int:
        """How many of the longer texts are in these bytes, in places."""
        found = 0
        for text in self._long:
            if text in content:  # far quicker than the pattern, which leaves out what is part of a longer id
                found += len(re.findall(rb"(?<![\w-])" + re.escape(text) + rb"(?![\w-])", content))
        return found


def _either(texts: Sequence[str]) -> str:
    """A regular expression, for RE2 and for Python, that any of the texts matches."""
    return "|".join(re.escape(text) for text in texts)


def _note(traces: list[Trace], where: str, places: int) -> None:
    if places:
        traces.append(Trace(where, places))
