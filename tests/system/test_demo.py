"""The demo as a person runs it: the shortened run, and Ctrl-C in the middle of one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accrual.broker import DevelopmentBroker
from tests.system.conftest import ROOT, QuickDemo, demo_environment

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.alone]


def processes_of(state: Path) -> list[str]:
    """Command lines of the running processes that were started with this state folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(state).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass  # it ended meanwhile, or is another user's
    return found


@pytest.mark.timeout(500)
def test_the_quick_demo_gets_better_and_its_books_balance(quick_demo: QuickDemo) -> None:
    figures, found = quick_demo.figures, quick_demo.figures.findings
    assert figures.balances
    assert sum(found.served.values()) == figures.rows
    assert len(found.trials) >= 2
    assert found.last is not None and found.last.champion.brier < found.last.generation_0.brier
    assert found.last.champion.accuracy > found.last.generation_0.accuracy
    assert all(max(trial.windows) < trial.window for trial in found.trials), "judged on rows it was trained on"
    assert len(found.generations) >= 2 and len(found.served) >= 2, "a new champion was published and served"
    assert set(found.served) <= set(found.generations)
    assert "<svg" in quick_demo.report.read_text()
    assert processes_of(quick_demo.state) == []


@pytest.mark.timeout(200)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    state = tmp_path / "state"
    demo = subprocess.Popen(
        [sys.executable, "-m", "examples.demo", "--quick", "--stream", "credit-risk"],
        cwd=ROOT,
        env=demo_environment(state, "127.0.0.1:1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    log = state / "demo" / "logs" / "service.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "predictions" in log.read_text()):
        assert time.monotonic() < deadline and demo.poll() is None, demo.communicate()[0]
        time.sleep(0.2)
    assert len(processes_of(state)) >= 6
    os.killpg(demo.pid, signal.SIGINT)
    said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, said
    assert "everything that was started is stopped" in said
    assert processes_of(state) == []
    for folder in (state, state / "demo"):  # `accrual broker` with the demo's own configuration is about the same one
        assert DevelopmentBroker(folder / "broker").status() is None
        assert (folder / "broker" / "server.properties").is_file(), folder
