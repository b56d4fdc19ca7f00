"""The supervisor with real processes: restarts, gives up, and leaves nothing behind however its owner ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accrual.errors import WorkerFailed
from accrual.supervisor import Supervisor

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only waits to be reaped, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 20 s"
        time.sleep(0.02)


def watch_until(supervisor: Supervisor, condition: Callable[[], bool]) -> None:
    def watched() -> bool:
        supervisor.watch()
        return condition()

    until(watched)


def test_a_killed_process_is_started_again_and_its_log_goes_on(tmp_path: Path) -> None:
    with Supervisor(tmp_path, {}, backoff_s=0.01) as supervisor:
        worker = supervisor.start("worker", SLEEP)
        until(lambda: worker.log.read_text() == "up\n")
        first = worker.process.pid
        os.kill(first, signal.SIGKILL)
        watch_until(supervisor, lambda: worker.restarts == 1)
        assert worker.process.pid != first
        until(lambda: worker.log.read_text() == "up\nup\n")
    assert not alive(worker.process.pid)


def test_one_that_ended_well_is_not_started_again(tmp_path: Path) -> None:
    with Supervisor(tmp_path, {}) as supervisor:
        worker = supervisor.start("worker", [sys.executable, "-c", ""])
        watch_until(supervisor, lambda: worker.finished)
        supervisor.watch()
        assert worker.restarts == 0


def test_one_that_keeps_dying_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    broken = [sys.executable, "-c", "import os, sys; sys.exit('no such contract: ' + os.environ['ACCRUAL_X'])"]
    with Supervisor(tmp_path, {"ACCRUAL_X": "x"}, give_up_after=3, backoff_s=0.01) as supervisor:
        worker = supervisor.start("worker", broken)
        with pytest.raises(WorkerFailed, match=r"worker died 3 times .*exit status 1(?s:.*)no such contract: x"):
            watch_until(supervisor, lambda: False)
        assert worker.restarts == 2


def test_a_death_after_a_long_life_does_not_count_towards_giving_up(tmp_path: Path) -> None:
    with Supervisor(tmp_path, {}, give_up_after=2, quick_s=0.0, backoff_s=0.01) as supervisor:
        worker = supervisor.start("worker", [sys.executable, "-c", "raise SystemExit(1)"])
        watch_until(supervisor, lambda: worker.restarts == 4)


def test_stop_kills_what_does_not_stop(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, {})
    workers = [supervisor.start("gentle", SLEEP), supervisor.start("stubborn", STUBBORN)]
    until(lambda: all(w.log.read_text() == "up\n" for w in workers))
    supervisor.stop(timeout_s=0.5)
    assert [w.process.returncode for w in workers] == [-signal.SIGTERM, -signal.SIGKILL]


OWNER = """
import signal, sys, time
from pathlib import Path
from accrual.supervisor import Supervisor
signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in the background ignores it
with Supervisor(Path(sys.argv[1]), {}) as supervisor:
    worker = supervisor.start("worker", [sys.executable, "-c", "import time; time.sleep(600)"])
    print(worker.process.pid, flush=True)
    while True:
        supervisor.watch()
        time.sleep(0.05)
"""


@pytest.mark.parametrize(
    "sign",
    [
        signal.SIGINT,
        pytest.param(
            signal.SIGKILL,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death"),
        ),
    ],
)
def test_nothing_outlives_the_owner(tmp_path: Path, sign: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert alive(pid)
    owner.send_signal(sign)
    owner.communicate(timeout=30)
    until(lambda: not alive(pid))
