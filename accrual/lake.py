"""The lake: ground truth and the raw events as DuckLake tables. The only importer of duckdb.

Any number of processes read (`open_lake`); one writes (`open_lake_for_writing`, which holds a file lock: two writers
have corrupted SQLite catalogs). Readers and writer do not wait for each other: the catalog is in WAL mode, and a
reader's query sees one snapshot from start to end.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import duckdb
import msgspec
import pyarrow as pa

from accrual.config import Config
from accrual.errors import LakeError, LakeLocked, LakeUnavailable, NotHere
from accrual.lake_tables import PARTITIONED, TABLES, VIEWS

_BUSY_TIMEOUT_MS = 30_000
# What the engine raises when catalog or data cannot be reached, or another transaction was faster.
_TRANSIENT = (duckdb.IOException, duckdb.TransactionException, duckdb.ConnectionException)


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

    def rows(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Run one statement; its rows as dictionaries. `?` in `sql` stands for `params`.

        Raises LakeError if the statement is wrong, LakeUnavailable if the lake cannot be reached.
        """
        rows: list[dict[str, Any]] = self.arrow(sql, params).to_pylist()
        return rows

    def arrow(self, sql: str, params: Sequence[Any] = ()) -> pa.Table:
        """Run one statement; its rows as an Arrow table. Raises like `rows`."""
        with _engine_errors():
            try:
                return self._connection.execute(sql, list(params)).to_arrow_table()
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
    """The lake in the hands of its one writer."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, lock: IO[str]) -> None:
        super().__init__(connection)
        self._lock = lock

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside commit together, or none does."""
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
        """Add `rows` (by table) and make `moves`, in one transaction.

        False, with nothing written, if some topic-partition is no longer where its move expects it: another writer
        was there first. Raises LakeUnavailable if the commit did not happen and may be tried again.
        """
        try:
            with self.transaction():
                for table, batch in rows.items():
                    with self.with_tables({"batch": batch}):
                        self.rows(f'insert into lake."{table}" by name select * from batch')
                if moves and self._make(moves) != len(moves):
                    raise _Overtaken
        except _Overtaken:
            return False
        return True

    def offsets(self) -> dict[tuple[str, int], int]:
        """The next offset of every topic-partition the lake knows."""
        rows = self.rows("select topic, partition, next_offset from lake.offsets")
        return {(row["topic"], row["partition"]): row["next_offset"] for row in rows}

    def begin_at(self, first: Mapping[tuple[str, int], int]) -> None:
        """Enter topic-partitions the lake does not know yet, each with the offset its records begin at."""
        rows = [{"topic": t, "partition": p, "first_offset": o, "next_offset": o} for (t, p), o in first.items()]
        if rows:
            self.append({"offsets": pa.Table.from_pylist(rows, TABLES["offsets"])})

    def close(self) -> None:
        """Close the connection, then release the writer's lock."""
        super().close()
        self._lock.close()

    def _make(self, moves: Sequence[Move]) -> int:
        table = pa.Table.from_pylist([msgspec.structs.asdict(move) for move in moves])
        with self.with_tables({"moves": table}):
            done = self.rows(
                "update lake.offsets set next_offset = moves.next from moves"
                " where offsets.topic = moves.topic and offsets.partition = moves.partition"
                " and offsets.next_offset = moves.expected"
            )
        return int(done[0]["Count"])


@_interruptible()
def open_lake(config: Config, *, at_snapshot: int | None = None) -> Lake:
    """Open the lake for reading, at its newest snapshot or pinned to one.

    Raises LakeUnavailable while there is no lake yet or its catalog cannot be reached, LakeError for a snapshot that
    does not exist.
    """
    catalog = config.lake_catalog
    if catalog.startswith("sqlite:") and not Path(catalog.removeprefix("sqlite:")).is_file():
        raise LakeUnavailable(f"there is no lake at {catalog} yet; the sink makes it: `accrual sink`")
    connection = _connect(config)
    try:
        _open(connection, config, "READ_ONLY")
        with _engine_errors():
            if not _has_tables(connection):
                raise LakeUnavailable("the lake is being made; try again in a moment")
            if at_snapshot is not None:
                _pin(connection, config, at_snapshot)
    except BaseException:
        connection.close()
        raise
    return Lake(connection, at_snapshot)


@_interruptible()
def open_lake_for_writing(config: Config) -> WritableLake:
    """Open the lake as its one writer, making it and its tables if needed.

    Raises LakeLocked, naming the process, while another one writes; LakeUnavailable if the catalog cannot be reached.
    """
    catalog = config.lake_catalog
    local = catalog.startswith("sqlite:")
    beside = Path(catalog.removeprefix("sqlite:")) if local else config.state_dir / "lake" / "catalog"
    beside.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(beside.with_suffix(".writer"))
    connection = _connect(config)
    try:
        options = "DATA_INLINING_ROW_LIMIT 0" + (", META_JOURNAL_MODE 'WAL'" if local else "")
        _open(connection, config, options)
        lake = WritableLake(connection, lock)
        if not _has_tables(connection):
            _make_tables(lake)
    except BaseException:
        connection.close()
        lock.close()
        raise
    return lake


def attach_statements(config: Config) -> str:
    """The SQL with which any DuckDB that has a network reads this lake. S3 needs a secret besides (`CREATE SECRET`)."""
    needed = ["ducklake", "sqlite" if config.lake_catalog.startswith("sqlite:") else "postgres"]
    needed += ["httpfs"] if config.lake_data.startswith("s3://") else []
    return "\n".join([*(f"INSTALL {name};" for name in needed), f"{_attach(config, 'READ_ONLY')};", "USE lake;"])


def _attach(config: Config, options: str) -> str:
    if config.lake_catalog.startswith("sqlite:"):
        options += f", META_BUSY_TIMEOUT {_BUSY_TIMEOUT_MS}"
    catalog, data = _quoted(f"ducklake:{config.lake_catalog}"), _quoted(config.lake_data)
    return f"ATTACH {catalog} AS lake (DATA_PATH {data}, {options})"


def _connect(config: Config) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory with the extensions this lake needs, loaded from their Python packages: no network."""
    connection = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    local = config.lake_catalog.startswith("sqlite:")
    remote = config.lake_data.startswith("s3://")
    for name in ("ducklake", "sqlite_scanner" if local else "postgres_scanner", *(["httpfs"] if remote else [])):
        connection.execute(f"LOAD {_quoted(str(_extension(name)))}")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET temp_directory = {_quoted(str(config.state_dir / 'lake' / 'spill'))}")
    if remote:
        connection.execute(_s3_secret(config))
    return connection


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


def _has_tables(connection: duckdb.DuckDBPyConnection) -> bool:
    found = connection.execute("select table_name from duckdb_tables() where database_name = 'lake'").fetchall()
    return set(TABLES) <= {name for (name,) in found}


def _make_tables(lake: WritableLake) -> None:
    """All tables and views in one transaction: a reader sees none or all."""
    with lake.transaction():
        for name, schema in TABLES.items():
            with lake.with_tables({"shape": schema.empty_table()}):
                lake.rows(f'create table lake."{name}" as from shape')
            if name in PARTITIONED:
                lake.rows(f'alter table lake."{name}" set partitioned by ({PARTITIONED[name]})')
        for name, query in VIEWS.items():
            lake.rows(f'create view lake."{name}" as {query}')


def _pin(connection: duckdb.DuckDBPyConnection, config: Config, snapshot: int) -> None:
    """Attach the lake anew as it was at a snapshot."""
    [(oldest, newest)] = connection.execute(
        "select min(snapshot_id), max(snapshot_id) from lake.snapshots()"
    ).fetchall()
    if not oldest <= snapshot <= newest:
        raise LakeError(f"the lake has no snapshot {snapshot}; it has {oldest} to {newest}")
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


class _Overtaken(Exception):
    """Rolls a transaction back whose expected offsets no longer hold."""


@contextmanager
def _engine_errors() -> Iterator[None]:
    """The engine's exceptions as ours, its reason kept."""
    try:
        with _interruptible():
            yield
    except _TRANSIENT as exc:
        raise LakeUnavailable(f"the lake cannot be reached: {exc}") from exc
    except duckdb.Error as exc:
        raise LakeError(str(exc)) from exc
