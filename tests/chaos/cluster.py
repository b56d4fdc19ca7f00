"""The processes that faults happen to: join workers with a folder of their own each, kept running, and watched."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec

from accrual.broker import DevelopmentBroker
from accrual.config import Config
from accrual.kafka import KafkaException, TopicNames, TopicPartition, consumer

RESTART_AFTER_S = 1.0
WATCH_S = 0.1
DISK_BYTES = 24 << 20


class Health(msgspec.Struct, frozen=True):
    """What a worker's /health says."""

    state: str = "unreachable"
    partitions: tuple[int, ...] = ()
    last_turn_age_s: float = float("inf")


class Worker:
    """One join worker: its process, its folder and its web view. While it is wanted, it is started again when it ends.

    `ended` counts how often it ended by itself. Faults of one worker come from one thread; the watch from another.
    """

    def __init__(self, config: Config, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.ended = 0
        self._config = msgspec.structs.replace(config, state=str(folder / "state"))
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._environment: dict[str, str] = {}
        self._lock = threading.RLock()
        self.state.mkdir(parents=True)

    @property
    def state(self) -> Path:
        """The worker's state folder."""
        return self._config.state_dir

    @property
    def log(self) -> Path:
        """What all processes of this worker said."""
        return self.folder / "worker.log"

    def start(self, environment: dict[str, str] | None = None) -> None:
        """Start it, and keep it running; `environment` adds variables, for restarts too."""
        with self._lock:
            self._wanted = True
            self._environment = environment or {}
            self._start()

    def kill(self) -> None:
        """SIGKILL; it stays away until `start`."""
        with self._lock:
            self._wanted = False
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def stop(self, patience_s: float = 30.0) -> bool:
        """SIGTERM; False when that does not end it within `patience_s`, or not with exit code 0.

        It is then aborted, which leaves the stacks of its threads in the log. One that had not yet got so far that it
        minds SIGTERM has nothing to end.
        """
        with self._lock:
            self._wanted = False
            if self._process is None or self._process.poll() is not None:
                return True
            self._process.terminate()
            try:
                code = self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._say(f"did not end within {patience_s:.0f} s of SIGTERM")
                self._process.send_signal(signal.SIGABRT)
                self._process.wait()
                return False
            if code not in (0, -signal.SIGTERM):
                self._say(f"ended on SIGTERM with exit code {code}")
                return False
            return True

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def keep_running(self) -> None:
        """Start it again when it is wanted and has ended, as a supervisor does."""
        with self._lock:
            if self._wanted and self._process is not None and self._process.poll() is not None:
                self.ended += 1
                self._say(f"ended by itself with exit code {self._process.returncode}")
                time.sleep(RESTART_AFTER_S)
                self._start()

    def health(self) -> Health:
        """What it says of itself at the moment."""
        try:
            with urlopen(f"http://127.0.0.1:{self._port}/health", timeout=0.5) as answer:
                body = answer.read()
        except HTTPError as exc:
            body = exc.read()
        except OSError:
            return Health()
        return msgspec.json.decode(body, type=Health)

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "streams", "worker", "--worker-id", self.name, "--web-port", str(self._port)],
                env={**os.environ, **self._config.environment(), "PYTHONFAULTHANDLER": "1", **self._environment},
                stdout=log,
                stderr=log,
            )

    def _signal(self, which: signal.Signals) -> None:
        with self._lock:
            if self._process is not None:
                self._process.send_signal(which)

    def _say(self, what: str) -> None:
        with self.log.open("a") as log:
            log.write(f"--- {what}\n")


class Cluster:
    """A broker and the workers of one group; leaving it ends the workers, by force."""

    def __init__(self, broker: DevelopmentBroker, port: int, config: Config, folder: Path) -> None:
        self.broker = broker
        self.port = port
        self.workers: dict[str, Worker] = {}
        self._config = config
        self._folder = folder
        self._watching = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, name="watch")

    def __enter__(self) -> Cluster:
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.set()
        self._watch.join()
        for worker in self.workers.values():
            worker.kill()
        unmount(self._folder)

    def worker(self, name: str) -> Worker:
        """The worker of this name, made when there is none; not started."""
        if name not in self.workers:
            made = Worker(self._config, name, self._folder / name)
            self.workers = {**self.workers, name: made}
        return self.workers[name]

    def small_disk(self, worker: Worker) -> bool:
        """Mount a small disk as the state folder of a worker that does not run; False where that is not allowed."""
        options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(worker.state)]
        return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0

    @contextmanager
    def amid_a_transaction(self, partitions: tuple[int, ...], patience_s: float = 2.0) -> Iterator[None]:
        """Enter as soon as a record comes to ground truth in one of these partitions.

        After `patience_s` in any case, and at once when the broker is away.
        """
        topic = TopicNames(self._config.topics.prefix).ground_truth
        deadline = time.monotonic() + patience_s
        # Closed after the body only: that takes longer than a commit.
        with closing(consumer(self._config, "watch", **{"isolation.level": "read_uncommitted"})) as watch:
            before: list[object] = []
            try:
                while time.monotonic() < deadline:
                    ends = [watch.get_watermark_offsets(TopicPartition(topic, n), timeout=1.0) for n in partitions]
                    if before and ends != before:
                        break
                    before = [*ends]
            except KafkaException:
                pass
            yield

    def kill_broker(self) -> None:
        """SIGKILL the broker; it is gone when this returns."""
        running = self.broker.status()
        if running is not None:
            os.kill(running.pid, signal.SIGKILL)
            while self.broker.status() is not None:
                time.sleep(0.02)

    def start_broker(self) -> None:
        """Start it on the same port, and return when it answers."""
        self.broker.start(self.port)

    def recovered_since(self, moment: float, partitions: int) -> bool:
        """Whether every partition is joined by a worker that has turned since `moment` (of the monotonic clock)."""
        now = time.monotonic()
        healths = [worker.health() for worker in self.workers.values()]
        turned = [h for h in healths if h.state == "running" and h.last_turn_age_s < now - moment]
        return len({partition for health in turned for partition in health.partitions}) == partitions

    def _keep_watch(self) -> None:
        while not self._watching.wait(WATCH_S):
            for worker in self.workers.values():
                worker.keep_running()


@contextmanager
def own_broker(folder: Path) -> Iterator[tuple[DevelopmentBroker, int]]:
    """A broker that may be killed, and its port."""
    broker = DevelopmentBroker(folder)
    port = broker.start(free_port()).port
    try:
        yield broker, port
    finally:
        broker.stop()


def unmount(folder: Path) -> None:
    """Take away the small disks of the workers in a seed's folder, as soon as nothing is using them any more."""
    for state in folder.glob("*/state"):
        if state.is_mount():
            subprocess.run(["umount", "--lazy", str(state)], check=True)


def free_of_state(worker: Worker) -> None:
    """Delete what a worker keeps on its disk; the folder itself may be a mount and stays."""
    for path in worker.state.iterdir():
        shutil.rmtree(path, ignore_errors=True)


def free_port() -> int:
    """A port that stays free while its owner is down: no system gives such a low one to whoever asks for any."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
