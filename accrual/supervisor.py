"""A small supervisor for a few worker processes of one machine: start, restart what crashes, stop all.

For the demo and the tests; in production this is systemd's or the orchestrator's work. It has no thread of its own:
whoever owns it calls `watch` a few times a second.

Nothing stays behind: each process leads a group of its own, so that Ctrl-C in the terminal reaches only the owner, who
stops them in order; and on Linux the kernel kills each when its owner dies, even by `kill -9`. The workers survive
that by design.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from accrual.errors import WorkerFailed

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass
class Worker:
    """One supervised process. `restarts` counts how often it was started again after a crash."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    restarts: int = 0
    quick_deaths: int = 0
    restart_at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether it ended by itself with exit status 0: such a one is not started again."""
        return self.process.returncode == 0


class Supervisor:
    """Runs named processes; each one's output goes to `<logs>/<name>.log`. Use from one thread only."""

    def __init__(
        self,
        logs: Path,
        environment: Mapping[str, str],
        *,
        give_up_after: int = 5,
        quick_s: float = 20.0,
        backoff_s: float = 0.2,
    ) -> None:
        """`environment` is added to the owner's.

        A process that dies `give_up_after` times in a row, each within `quick_s` seconds of its start, is given up; the
        wait before a restart begins at `backoff_s` and doubles with each of those deaths.
        """
        self.workers: dict[str, Worker] = {}
        self._logs = logs
        self._environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
        self._give_up_after = give_up_after
        self._quick_s = quick_s
        self._backoff_s = backoff_s

    def start(self, name: str, command: Sequence[str]) -> Worker:
        """Start a process under a name of its own."""
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{name}.log"
        worker = Worker(name, command, self._spawn(command, path), path, time.monotonic())
        self.workers[name] = worker
        return worker

    def watch(self) -> None:
        """Restart what crashed, after its backoff. Raises WorkerFailed, with its log's end, for what keeps dying."""
        now = time.monotonic()
        for worker in self.workers.values():
            status = worker.process.poll()
            if status is None or status == 0:
                continue
            if worker.restart_at is None:
                self._note_death(worker, status, now)
            elif now >= worker.restart_at:
                worker.process = self._spawn(worker.command, worker.log)
                worker.started, worker.restart_at = now, None
                worker.restarts += 1

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ask all to stop (SIGTERM) and wait; kill what is left after `timeout_s` seconds. Nothing runs afterwards."""
        for worker in self.workers.values():
            _signal_group(worker, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        try:
            for worker in self.workers.values():
                try:
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    log.warning("%s did not stop within %.0f s and is killed", worker.name, timeout_s)
        finally:  # also when a second Ctrl-C cuts the wait short
            for worker in self.workers.values():
                _signal_group(worker, signal.SIGKILL)
                worker.process.wait()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _note_death(self, worker: Worker, status: int, now: float) -> None:
        worker.quick_deaths = worker.quick_deaths + 1 if now - worker.started < self._quick_s else 1
        if worker.quick_deaths >= self._give_up_after:
            raise WorkerFailed(
                f"{worker.name} died {worker.quick_deaths} times within {self._quick_s:.0f} s of its start"
                f" (last: {_status(status)}); the end of {worker.log}:\n{_tail(worker.log)}"
            )
        wait = self._backoff_s * 2 ** (worker.quick_deaths - 1)
        worker.restart_at = now + wait
        log.warning("%s ended (%s); started again in %.1f s; see %s", worker.name, _status(status), wait, worker.log)

    def _spawn(self, command: Sequence[str], path: Path) -> subprocess.Popen[bytes]:
        with path.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                process_group=0,
                preexec_fn=_DieWithOwner(os.getpid()) if _LIBC is not None else None,
            )


class _DieWithOwner:
    """Runs in the child, between fork and exec: one system call, so that it is safe there."""

    def __init__(self, owner: int) -> None:
        self._owner = owner

    def __call__(self) -> None:
        assert _LIBC is not None
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._owner:  # it died before the call
            os._exit(1)


def _signal_group(worker: Worker, sign: signal.Signals) -> None:
    try:
        os.killpg(worker.process.pid, sign)
    except (ProcessLookupError, PermissionError):  # gone; macOS says EPERM for a group of zombies
        pass


def _status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
