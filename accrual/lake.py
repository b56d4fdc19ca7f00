"""The lake: ground truth and the raw events as DuckLake tables. The only importer of duckdb.

Any number of processes read (`open_lake`). With a SQLite catalog one writes (`open_lake_for_writing` holds a file lock:
two writers have corrupted such catalogs); with PostgreSQL several do, each for the topic-partitions it has claimed.
Readers and writers do not wait for each other, and a reader's query sees one snapshot from start to end.

Why no record comes twice: a writer adds rows and the move that stands for them in one transaction, if in the lake it is
still the owner and still where the move begins. A claim takes ownership and rewrites all moves, which DuckLake holds
for a conflict with any that are being added: a zombie's transaction fails if a claim came while it ran, and finds
another owner if it began later. Moves of different owners do not conflict.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import random
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import duckdb
import msgspec
import pyarrow as pa

from accrual.config import Config
from accrual.errors import LakeConflict, LakeError, LakeLocked, LakeUnavailable, NotHere
from accrual.lake_tables import FIRST_MOVE, INLINED, PARTITIONED, TABLES, VIEWS
from accrual.lake_views import QUESTIONS

_BUSY_TIMEOUT_MS = 30_000
# What the engine raises when catalog or data cannot be reached.
_TRANSIENT = (duckdb.IOException, duckdb.ConnectionException)
# What PostgreSQL's client says when the server dies. The engine raises it as whatever it was about: a BinderException.
_CATALOG_GONE = ("server closed the connection", "connection to server", "no connection to the server")
# How often a transaction is begun anew when another was faster, and the pause before: a random part of a growing one.
_ATTEMPTS = 8
_ALL_ROWS = 1_000_000
_BATCH_ROWS = 20_000
_PAUSE_S = 0.1
_LEFT_S = 7 * 24 * 3600
_T = TypeVar("_T")


@contextmanager
def _interruptible() -> Iterator[None]:
    """What a signal handler raised is raised again: the engine makes a RuntimeError of it."""
    try:
        yield
    except RuntimeError as exc:
        if exc.__cause__ is None or isinstance(exc.__cause__, Exception):
            raise
        raise exc.__cause__ from None


class Move(msgspec.Struct, frozen=True):
    """The sink's step on one topic-partition: from `expected`, the first record not yet in the lake, to `next`."""

    topic: str
    partition: int
    expected: int
    next: int


class Lake:
    """An open lake for reading. Close it, or use it as a context manager; one thread at a time."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, at_snapshot: int | None = None) -> None:
        self._connection = connection
        self._at_snapshot = at_snapshot

    def rows(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Run one statement; its rows as dictionaries. `?`, or `$name` of a mapping, in `sql` stands for `params`.

        Raises LakeError if the statement is wrong, LakeUnavailable if the lake cannot be reached.
        """
        rows: list[dict[str, Any]] = self.arrow(sql, params).to_pylist()
        return rows

    def arrow(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> pa.Table:
        """Run one statement; its rows as an Arrow table. Raises like `rows`."""
        with _engine_errors():
            try:
                return self._connection.execute(sql, params).to_arrow_table()
            except BaseException:
                self._connection.interrupt()  # after a signal its threads would compute on, and closing wait for them
                raise

    @contextmanager
    def with_tables(self, tables: Mapping[str, pa.Table]) -> Iterator[None]:
        """Let statements inside the block read Arrow tables by these names."""
        for name, table in tables.items():
            self._connection.register(name, table)
        try:
            yield
        finally:
            for name in tables:
                self._connection.unregister(name)

    def batches(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> Iterator[pa.RecordBatch]:
        """Run one statement; its rows as Arrow batches, computed as they are asked for. Raises like `rows`."""
        with _engine_errors():
            reader = self._connection.execute(sql, params).to_arrow_reader(_BATCH_ROWS)
        while True:
            with _engine_errors():
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    return
                except pa.ArrowException as exc:
                    raise LakeError(str(exc)) from exc
            yield batch

    def snapshot_at(self, moment: datetime) -> int:
        """The newest snapshot that was committed at `moment` or before. Raises LakeError if there is none so old."""
        found = self.rows(
            """
            select max(snapshot_id) filter (snapshot_time <= $1) as id, min(snapshot_time) as oldest
            from ducklake_snapshots('lake')
            """,
            [moment],
        )[0]
        if found["id"] is None:
            raise LakeError(
                f"the lake has no snapshot of {moment:%Y-%m-%d %H:%M:%S%z}; its oldest is of {found['oldest']}"
            )
        return int(found["id"])

    def snapshot_id(self) -> int:
        """The snapshot that a statement reads now (the pinned one if the lake was opened at one)."""
        if self._at_snapshot is not None:
            return self._at_snapshot
        return int(self.rows("select id from lake.current_snapshot()")[0]["id"])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WritableLake(Lake):
    """The lake in the hands of a writer. `alone`: it is the only one there can be."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, lock: IO[str] | None) -> None:
        super().__init__(connection)
        self._lock = lock
        self._id = uuid.uuid4().hex

    @property
    def alone(self) -> bool:
        """Whether no other process can write this lake meanwhile."""
        return self._lock is not None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside commit together, or none does; they see one snapshot.

        Raises LakeConflict, with nothing written, if another writer's transaction came first.
        """
        self.rows("begin")
        try:
            yield
            self.rows("commit")
        except BaseException:
            try:
                self._connection.rollback()
            except duckdb.Error:
                pass  # a commit that failed has rolled back already
            raise

    def append(self, rows: Mapping[str, pa.Table], moves: Sequence[Move] = ()) -> bool:
        """Add `rows` (by table) and make `moves`, in one transaction, again while other writers are faster.

        False, with nothing written, if some topic-partition has another owner by now, or is no longer where its move
        expects it. Raises LakeUnavailable if the commit did not happen and may be tried again.
        """

        def attempt() -> bool:
            with self.transaction():
                return self.add(rows, moves)

        return retried(attempt)

    def add(self, rows: Mapping[str, pa.Table], moves: Sequence[Move]) -> bool:
        """What `append` does, inside a transaction of the caller's."""
        made = pa.table(
            {
                "topic": pa.array([m.topic for m in moves], pa.string()),
                "partition": pa.array([m.partition for m in moves], pa.int32()),
                "first_offset": pa.array([m.expected for m in moves], pa.int64()),
                "next_offset": pa.array([m.next for m in moves], pa.int64()),
            }
        )
        if moves and self._possible(made) != len(moves):
            return False
        for table, batch in {**rows, "moves": made}.items():
            if len(batch):
                self._insert(table, batch)
        return True

    def offsets(self) -> dict[tuple[str, int], int]:
        """The next offset of every topic-partition the lake knows."""
        rows = self.rows("select topic, partition, next_offset from lake.offsets")
        return {(row["topic"], row["partition"]): row["next_offset"] for row in rows}

    def claim(self, first: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        """Own these topic-partitions from now on; returns the next offset of each.

        One that the lake does not know yet begins at the offset given. Their owners of before can make no more moves.
        """
        return retried(lambda: self._claim(first))

    def make_views(self, queries: Mapping[str, str]) -> None:
        """Make the views of these names where there is none, or another. A view's comment is its query's digest."""

        def attempt() -> None:
            there = {
                row["view_name"]: row["comment"]
                for row in self.rows("select view_name, comment from duckdb_views() where database_name = 'lake'")
            }
            digests = {name: hashlib.sha256(query.encode()).hexdigest() for name, query in queries.items()}
            wanted = [name for name, digest in digests.items() if there.get(name) != digest]
            if not wanted:
                return
            with self.transaction():
                for name in wanted:
                    self.rows(f'create or replace view lake."{name}" as {queries[name]}')
                    self.rows(f"comment on view lake.\"{name}\" is '{digests[name]}'")

        retried(attempt)

    def close(self) -> None:
        """Close the connection, then release the writer's lock."""
        super().close()
        if self._lock is not None:
            self._lock.close()

    def _claim(self, first: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        mine = pa.Table.from_pylist(
            [{"topic": topic, "partition": partition, "owner": self._id} for topic, partition in first],
            TABLES["owners"],
        )
        with self.transaction():
            moves = self.rows("from lake.offsets")
            known = {(row["topic"], row["partition"]): row["next_offset"] for row in moves}
            moves += [
                {"topic": topic, "partition": partition, "first_offset": offset, "next_offset": offset}
                for (topic, partition), offset in first.items()
                if (topic, partition) not in known
            ]
            with self.with_tables({"mine": mine}):
                self.rows("delete from lake.owners where (topic, partition) in (select topic, partition from mine)")
            self.rows("delete from lake.moves")
            self._insert("owners", mine)
            self._insert("moves", pa.Table.from_pylist([FIRST_MOVE, *moves], TABLES["moves"]))
        return {place: known.get(place, offset) for place, offset in first.items()}

    def _possible(self, moves: pa.Table) -> int:
        """How many of the moves are on a topic-partition of this writer's, from where it is."""
        with self.with_tables({"wanted": moves}):
            found = self.rows(
                "select count(*) as n from wanted w join lake.offsets o using (topic, partition)"
                " join lake.owners using (topic, partition) where o.next_offset = w.first_offset and owner = ?",
                [self._id],
            )
        return int(found[0]["n"])

    def _insert(self, table: str, rows: pa.Table) -> None:
        with self.with_tables({"batch": rows}):
            self.rows(f'insert into lake."{table}" by name select * from batch')


@_interruptible()
def open_lake(config: Config, *, at_snapshot: int | None = None, memory: str | None = None) -> Lake:
    """Open the lake for reading, at its newest snapshot or pinned to one.

    `memory`: what the engine may hold of it at once, such as `256MiB`; the rest of a large sort or join lies in a file
    meanwhile. Without it, the engine takes up to four fifths of the machine's.

    Raises LakeUnavailable while there is no lake yet or its catalog cannot be reached, LakeError for a snapshot that
    does not exist.
    """
    catalog = config.lake_catalog
    if catalog.startswith("sqlite:") and not Path(catalog.removeprefix("sqlite:")).is_file():
        raise LakeUnavailable(f"there is no lake at {catalog} yet; the sink makes it: `accrual sink`")
    connection = _connect(config)
    try:
        if memory is not None:
            # Each thread has buffers of its own, which alone may be more than is allowed.
            connection.execute(f"SET memory_limit = {_quoted(memory)}; SET threads = 1")
        _open(connection, config, "READ_ONLY")
        with _engine_errors():
            if missing := _missing_tables(connection) or _missing_views(connection):
                raise LakeUnavailable(
                    f"the lake has no {missing[0]} yet; the sink makes it when it starts: `accrual sink`"
                )
            if at_snapshot is not None:
                _pin(connection, config, at_snapshot)
    except BaseException:
        connection.close()
        raise
    return Lake(connection, at_snapshot)


@_interruptible()
def open_lake_for_writing(config: Config) -> WritableLake:
    """Open the lake for writing, making it and its tables if needed.

    Raises LakeLocked, naming the process, while another one writes a SQLite catalog; LakeUnavailable if the catalog
    cannot be reached.
    """
    catalog = config.lake_catalog
    options, lock = "DATA_INLINING_ROW_LIMIT 0", None
    if catalog.startswith("sqlite:"):
        file = Path(catalog.removeprefix("sqlite:"))
        file.parent.mkdir(parents=True, exist_ok=True)
        options, lock = f"{options}, META_JOURNAL_MODE 'WAL'", _lock(file.with_suffix(".writer"))
    if config.lake.encrypted:
        options += ", ENCRYPTED"
    connection = _connect(config)
    lake = WritableLake(connection, lock)
    try:
        _remove_what_was_left(_spill(config))
        _open(connection, config, options)
        _check_encryption(lake, config)
        if missing := _missing_tables(connection):
            _make_tables(lake, missing)
        lake.make_views(VIEWS | QUESTIONS)
        lake.rows("set preserve_insertion_order = false")  # a batch then goes to its files as it comes
        # Two threads cost 1.7 us a row where one costs 1.1, and a merge of small files takes 220 MiB instead of 30.
        lake.rows("set threads = 1")
        lake.rows("call ducklake_set_option('lake', 'parquet_compression', 'zstd')")
        for name in INLINED:
            lake.rows(
                f"call ducklake_set_option('lake', 'data_inlining_row_limit', {_ALL_ROWS}, schema => 'main',"
                f" table_name => '{name}')"
            )
        if not lake.rows("from lake.moves limit 1"):
            lake.rows(f"insert into lake.moves values {tuple(FIRST_MOVE.values())}")
    except BaseException:
        lake.close()
        raise
    return lake


def attach_statements(config: Config) -> str:
    """The SQL with which any DuckDB that has a network reads this lake. S3 needs a secret besides (`CREATE SECRET`)."""
    needed = ["ducklake", "sqlite" if config.lake_catalog.startswith("sqlite:") else "postgres"]
    needed += ["httpfs"] if config.lake_data.startswith("s3://") else []
    return "\n".join([*(f"INSTALL {name};" for name in needed), f"{_attach(config, 'READ_ONLY')};", "USE lake;"])


def shell(config: Config, at_snapshot: int | None = None) -> tuple[str, str]:
    """The DuckDB shell's program, and the SQL that attaches this lake in it, read-only.

    The SQL holds the catalog's and the store's credentials. Raises NotHere if the shell is not installed.
    """
    package = importlib.util.find_spec("duckdb_cli")
    if package is None or package.origin is None:
        raise NotHere("DuckDB's shell is not installed: pip install 'accrual[lake]'")
    options = "READ_ONLY" if at_snapshot is None else f"READ_ONLY, SNAPSHOT_VERSION {at_snapshot}"
    statements = [*_preparation(config), _attach(config, options), "USE lake"]
    return str(Path(package.origin).parent / "duckdb"), "".join(f"{statement};\n" for statement in statements)


def _attach(config: Config, options: str) -> str:
    if config.lake_catalog.startswith("sqlite:"):
        options += f", META_BUSY_TIMEOUT {_BUSY_TIMEOUT_MS}"
    catalog, data = _quoted(f"ducklake:{config.lake_catalog}"), _quoted(config.lake_data)
    return f"ATTACH {catalog} AS lake (DATA_PATH {data}, {options})"


def _connect(config: Config) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory with the extensions this lake needs, loaded from their Python packages: no network."""
    with suppress(OSError):  # who may only read has nowhere to spill to
        _spill(config).mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    for statement in _preparation(config):
        connection.execute(statement)
    return connection


def _preparation(config: Config) -> list[str]:
    """What is said to a DuckDB before it attaches this lake."""
    local = config.lake_catalog.startswith("sqlite:")
    remote = config.lake_data.startswith("s3://")
    needed = ["ducklake", "sqlite_scanner" if local else "postgres_scanner"]
    if remote or config.lake.encrypted:  # httpfs has the cryptography that writing encrypted files needs
        needed.append("httpfs")
    return [
        *(f"LOAD {_quoted(str(_extension(name)))}" for name in needed),
        "SET TimeZone = 'UTC'",
        f"SET enable_progress_bar = {sys.stdout.isatty()}",  # it is drawn on standard output
        f"SET temp_directory = {_quoted(str(_spill(config) / uuid.uuid4().hex))}",
        *([_s3_secret(config)] if remote else []),
    ]


def _spill(config: Config) -> Path:
    """Where connections put what does not fit into memory, each into a folder of its own: in a shared one the engine
    takes another's files for its own. It removes the folder when it closes.
    """
    return config.state_dir / "lake" / "spill"


def _remove_what_was_left(spill: Path) -> None:
    """The folders of processes that were killed: those in which nothing has been made for long."""
    for folder in spill.glob("*"):
        with suppress(FileNotFoundError):  # its connection has just removed it
            if time.time() - folder.stat().st_mtime > _LEFT_S:
                shutil.rmtree(folder)


def _extension(name: str) -> Path:
    package = importlib.util.find_spec(f"duckdb_extension_{name}")
    if package is None or package.origin is None:
        raise NotHere(f"DuckDB's extension {name} is not installed: pip install 'accrual[lake]'")
    return Path(package.origin).parent / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"


def _s3_secret(config: Config) -> str:
    """Credentials from the standard AWS variables, for the endpoint of the configuration."""
    settings = {
        "KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", ""),
        "SECRET": os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
        "SESSION_TOKEN": os.environ.get("AWS_SESSION_TOKEN", ""),
        "REGION": os.environ.get("AWS_REGION", "us-east-1"),
    }
    if config.lake.s3_endpoint:
        settings |= {"ENDPOINT": config.lake.s3_endpoint, "URL_STYLE": "path"}
    listed = ", ".join(f"{key} {_quoted(value)}" for key, value in settings.items() if value)
    return f"CREATE SECRET lake_data (TYPE s3, {listed}, USE_SSL {str(config.lake.s3_use_ssl).lower()})"


def _lock(path: Path) -> IO[str]:
    """Hold the writer's lock until the file is closed; the kernel releases it when the process dies."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise LakeLocked(
            f"process {holder} writes this lake, and a lake has one writer: stop that one first ({path})"
        ) from exc
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _check_encryption(lake: Lake, config: Config) -> None:
    """A lake is encrypted from its making or never. Raises LakeError if this one is not as configured."""
    found = lake.rows("select value from __ducklake_metadata_lake.ducklake_metadata where key = 'encrypted'")
    encrypted = any(row["value"] == "true" for row in found)
    if encrypted and not config.lake.encrypted:
        raise LakeError("this lake is encrypted: set lake.encrypted (ACCRUAL_LAKE_ENCRYPTED=true)")
    if config.lake.encrypted and not encrypted:
        raise LakeError("this lake was made without encryption: unset lake.encrypted, or make a new lake with it")


def _missing_tables(connection: duckdb.DuckDBPyConnection) -> list[str]:
    found = connection.execute("select table_name from duckdb_tables() where database_name = 'lake'").fetchall()
    return [name for name in TABLES if (name,) not in found]


def _missing_views(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Those that other parts read by; a sink that starts makes them a moment after the tables."""
    found = connection.execute("select view_name from duckdb_views() where database_name = 'lake'").fetchall()
    return [name for name in VIEWS if (name,) not in found]


def _make_tables(lake: WritableLake, names: Sequence[str]) -> None:
    """These tables in one transaction: a reader sees none or all."""
    with lake.transaction():
        for name in names:
            with lake.with_tables({"shape": TABLES[name].empty_table()}):
                lake.rows(f'create table lake."{name}" as from shape')
            if name in PARTITIONED:
                lake.rows(f'alter table lake."{name}" set partitioned by ({PARTITIONED[name]})')


def _pin(connection: duckdb.DuckDBPyConnection, config: Config, snapshot: int) -> None:
    """Attach the lake anew as it was at a snapshot."""
    [(oldest, newest)] = connection.execute(
        "select min(snapshot_id), max(snapshot_id) from lake.snapshots()"
    ).fetchall()
    there = connection.execute(f"select 1 from lake.snapshots() where snapshot_id = {int(snapshot)}").fetchall()
    if not there:
        raise LakeError(
            f"the lake has no snapshot {snapshot}; it has {oldest} to {newest}, without those that expired or that"
            " `accrual erase` has made forget"
        )
    connection.execute("use memory; detach lake")
    _open(connection, config, f"READ_ONLY, SNAPSHOT_VERSION {int(snapshot)}")


def _open(connection: duckdb.DuckDBPyConnection, config: Config, options: str) -> None:
    """Attach the lake and make it the default. The message of a failure does not show the catalog's password."""
    try:
        connection.execute(_attach(config, options))
        connection.execute("use lake")
    except duckdb.Error as exc:
        reason = str(exc)
        if not config.lake_catalog.startswith("sqlite:"):
            reason = reason.replace(config.lake_catalog.partition(":")[2], "...")
        raise LakeUnavailable(f"the lake cannot be opened (the sink makes it: `accrual sink`): {reason}") from None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def json_path(name: str) -> str:
    """Where a field is in JSON, for the engine's functions."""
    return '$."' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def retried(attempt: Callable[[], _T]) -> _T:
    """The result of the first attempt during which no other writer is faster. Raises the last one's LakeConflict."""
    for number in range(_ATTEMPTS - 1):
        try:
            return attempt()
        except LakeConflict:
            time.sleep(random.uniform(0, _PAUSE_S * 2**number))
    return attempt()


@contextmanager
def _engine_errors() -> Iterator[None]:
    """The engine's exceptions as ours, its reason kept."""
    try:
        with _interruptible():
            yield
    except duckdb.TransactionException as exc:
        raise LakeConflict(f"another writer came first: {exc}") from exc
    except _TRANSIENT as exc:
        raise LakeUnavailable(f"the lake cannot be reached: {exc}") from exc
    except duckdb.Error as exc:
        if any(sign in str(exc) for sign in _CATALOG_GONE):
            raise LakeUnavailable(f"the lake's catalog went away: {exc}") from exc
        raise LakeError(str(exc)) from exc
