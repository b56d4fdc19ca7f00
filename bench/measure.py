"""What a process costs, and how values spread."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

_TICKS = os.sysconf("SC_CLK_TCK")
_T = TypeVar("_T")


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_mib(pid: int) -> float:
    """The most memory a process had resident so far (VmHWM), in MiB."""
    return _status_mib(pid, "VmHWM")


def own_mib(pid: int) -> float:
    """The memory of a process that no file stands behind, resident now (RssAnon), in MiB."""
    return _status_mib(pid, "RssAnon")


def _status_mib(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def in_process(function: Callable[..., _T], *arguments: object) -> _T:
    """Run it in a process of its own, so that it finds nothing in memory and its peak is its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least `percent` of a hundred do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def cores() -> tuple[int, int, int]:
    """A core for the broker, one for the worker, one for the bench itself; the same one where there are too few."""
    there = sorted(os.sched_getaffinity(0))
    broker, worker = there[0], there[min(1, len(there) - 1)]
    return broker, worker, there[2] if len(there) > 2 else broker


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What this thread starts meanwhile runs on this core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Worker:
    """A contender's process, alone on its core; what it says goes to `log`."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path, core: int) -> None:
        self._log = log
        with on_core(core), log.open("wb") as out:
            self._process = subprocess.Popen(
                argv,
                env={**os.environ, **env},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def check(self) -> None:
        """End the bench when the process has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"the worker ended with {self._process.returncode}:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def stop(self) -> None:
        """End it: politely, and after 30 s by force."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
