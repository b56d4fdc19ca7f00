"""Are the lake's files what they were when they were written?

DuckLake's catalog knows the size of each Parquet file and nothing of its content. The sink therefore records the
SHA-256 of new files in the table `files` (`record`, by the keeper in quiet moments), with the offsets whose rows each
one holds.
`verify` compares: the files of every snapshot that is still there, not of the newest alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Literal

import msgspec
import pyarrow as pa
from pyarrow import fs

from accrual.config import Config
from accrual.errors import LakeError, LakeUnavailable
from accrual.lake import Lake, WritableLake
from accrual.lake_tables import TABLES

State = Literal["ok", "unrecorded", "missing", "truncated", "altered"]
DAMAGED = ("missing", "truncated", "altered")
# Read by the keeper at most so much in one round; a round comes at most once a minute.
FILES_A_ROUND = 256
_BLOCK_BYTES = 1 << 20
_MAGIC = b"PAR1"
_FOOTER_BYTES = 8
log = logging.getLogger("accrual.lake")

CATALOG = "__ducklake_metadata_lake"
_FILES = f"""
with paths as (
    select table_id, any_value(t.table_name) as "table", any_value(s.path || t.path) as folder
    from {CATALOG}.ducklake_table t join {CATALOG}.ducklake_schema s using (schema_id) group by all
),
listed as (
    select d.data_file_id as id, table_id, d.path, d.file_size_bytes as bytes, d.record_count as rows,
        d.begin_snapshot as snapshot, d.partial_max is not null as merged, d.encryption_key is not null as encrypted,
        exists (from {CATALOG}.ducklake_delete_file x where x.data_file_id = d.data_file_id) as thinned
    from {CATALOG}.ducklake_data_file d
    union all
    select null, table_id, path, file_size_bytes, delete_count, begin_snapshot, false, encryption_key is not null, false
    from {CATALOG}.ducklake_delete_file
)
select l.* exclude (table_id, path), p."table", p.folder || l.path as path, f.bytes as recorded_bytes, f.sha256,
    f.ranges
from listed l join paths p using (table_id) left join lake.files f on f.path = p.folder || l.path
order by path
"""


class Range(msgspec.Struct, frozen=True):
    """Records of a topic-partition from `first` to `last`, both included, whose rows a file may hold.

    `snapshot`: the one the rows came with, in a file that was merged of several.
    """

    partition: int
    first: int
    last: int
    snapshot: int | None = None


class DataFile(msgspec.Struct, frozen=True):
    """A Parquet file as the catalog has it; `path` is below the data folder, `id` is None for one of deleted rows.

    `merged`: its rows carry the snapshots they came with. `thinned`: some of its rows were deleted since.
    `recorded_bytes`, `sha256` and `ranges` (JSON) are None until it is recorded.
    """

    id: int | None
    table: str
    path: str
    bytes: int
    rows: int
    snapshot: int
    merged: bool
    encrypted: bool
    thinned: bool
    recorded_bytes: int | None
    sha256: str | None
    ranges: str | None


class Found(msgspec.Struct, frozen=True):
    """What a file is now. `unrecorded` ones have the right size and a footer; more cannot be said."""

    file: DataFile
    state: State
    detail: str = ""


class DataFolder:
    """Where the Parquet files are, on a disk or in S3. Raises LakeUnavailable if it cannot be reached."""

    def __init__(self, config: Config) -> None:
        self.address = config.lake_data.rstrip("/")
        if self.address.startswith("s3://"):
            where = {"endpoint_override": config.lake.s3_endpoint} if config.lake.s3_endpoint else {}
            whole: fs.FileSystem = fs.S3FileSystem(
                access_key=os.environ.get("AWS_ACCESS_KEY_ID"),
                secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
                session_token=os.environ.get("AWS_SESSION_TOKEN"),
                region=os.environ.get("AWS_REGION", "us-east-1"),
                scheme="https" if config.lake.s3_use_ssl else "http",
                **where,
            )
            self.files = fs.SubTreeFileSystem(self.address.removeprefix("s3://"), whole)
        else:
            self.files = fs.SubTreeFileSystem(self.address, fs.LocalFileSystem())

    def size(self, path: str) -> int | None:
        """The size of a file, None if there is none."""
        try:
            info = self.files.get_file_info(path)
        except OSError as exc:
            raise LakeUnavailable(f"the lake's files cannot be reached: {exc}") from exc
        return info.size if info.type == fs.FileType.File else None

    def sha256(self, path: str) -> str:
        """The digest of a file, in hexadecimal."""
        digest = hashlib.sha256()
        with self._reading(path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def footer_is_whole(self, path: str, size: int) -> bool:
        """Whether the last bytes are those of a Parquet file."""
        with self._reading(path) as stream:
            stream.seek(max(0, size - _FOOTER_BYTES))
            tail = stream.read(_FOOTER_BYTES)
        return tail[4:] == _MAGIC and 0 < int.from_bytes(tail[:4], "little") < size

    def make_parent(self, path: str) -> None:
        """Make the folder of a file, where there are folders."""
        if not self.address.startswith("s3://"):
            self.files.create_dir(path.rpartition("/")[0], recursive=True)

    @contextmanager
    def _reading(self, path: str) -> Iterator[IO[bytes]]:
        try:
            with self.files.open_input_file(path) as stream:
                yield stream
        except OSError as exc:
            raise LakeUnavailable(f"the lake's file {path} cannot be read: {exc}") from exc


def data_files(lake: Lake) -> list[DataFile]:
    """All files of all snapshots, by path; without those that only wait for their deletion."""
    return msgspec.convert(lake.rows(_FILES), list[DataFile])


def verify(lake: Lake, config: Config, files: Sequence[DataFile]) -> Iterator[Found]:
    """What each of the files is now. Raises LakeUnavailable if the data folder cannot be reached."""
    folder = DataFolder(config)
    for file in files:
        found = _look(folder, file)
        if found.state in DAMAGED and file.path not in {one.path for one in data_files(lake)}:
            continue  # merged or expired, and deleted, since the list was made
        yield found


def _look(folder: DataFolder, file: DataFile) -> Found:
    size = folder.size(file.path)
    expected = file.bytes if file.recorded_bytes is None else file.recorded_bytes
    if size is None:
        return Found(file, "missing")
    if size < expected:
        return Found(file, "truncated", f"{size:,} of {expected:,} bytes")
    if size > expected:
        return Found(file, "altered", f"{size:,} bytes instead of {expected:,}")
    if file.sha256 is None:
        whole = folder.footer_is_whole(file.path, size)
        return Found(file, "unrecorded") if whole else Found(file, "altered", "it ends like no Parquet file")
    digest = folder.sha256(file.path)
    return Found(file, "ok") if digest == file.sha256 else Found(file, "altered", f"its SHA-256 is {digest}")


def record(lake: WritableLake, config: Config, limit: int = FILES_A_ROUND) -> int:
    """Record files that are new, `limit` at most, and forget those that are gone; returns how many are new.

    One that is not as long as the catalog says, or cannot be read, is left to `verify`. Raises LakeUnavailable,
    LakeConflict.
    """
    folder = DataFolder(config)
    files = data_files(lake)
    new = [file for file in files if file.sha256 is None][:limit]
    rows = []
    for file in new:
        if folder.size(file.path) != file.bytes:
            continue
        try:
            rows.append(entry(lake, folder, file))
        except LakeError as exc:
            log.warning("the lake's file %s is damaged: %s; see accrual lake verify", file.path, exc)
    gone = lake.rows("select path from lake.files")
    there = {file.path for file in files}
    gone = [row for row in gone if row["path"] not in there]
    if not rows and not gone:
        return 0
    with lake.transaction():
        if gone:
            with lake.with_tables({"gone": pa.Table.from_pylist(gone)}):
                lake.rows("delete from lake.files where path in (select path from gone)")
        lake.add({"files": pa.Table.from_pylist(rows, TABLES["files"])}, [])
    return len(rows)


def entry(lake: Lake, folder: DataFolder, file: DataFile, ranges: str | None = None) -> dict[str, object]:
    """The row of `files` for a file as it is now; `ranges` are found in it unless given."""
    return {
        "path": file.path,
        "bytes": folder.size(file.path),
        "sha256": folder.sha256(file.path),
        "ranges": _ranges(lake, folder, file) if ranges is None else ranges,
        "recorded_at": datetime.now(UTC),
    }


def _ranges(lake: Lake, folder: DataFolder, file: DataFile) -> str | None:
    """The offsets in a file, as JSON; None for a table whose rows do not say their own."""
    columns = TABLES[file.table].names if file.table in TABLES else []
    if file.id is None or file.encrypted or "offset" not in columns or file.table == "dead_letters":
        return None
    partition = '"partition"' if "partition" in columns else "0"
    snapshot = "_ducklake_internal_snapshot_id" if file.merged else "null"
    found = lake.rows(
        f'select {partition} as "partition", {snapshot} as snapshot, min("offset") as first, max("offset") as last'
        " from read_parquet(?) group by all order by all",
        [f"{folder.address}/{file.path}"],
    )
    return json.dumps(found)


def tally(found: Sequence[Found]) -> Counter[str]:
    """How many files are in each state."""
    return Counter(one.state for one in found)
