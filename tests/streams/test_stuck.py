"""A worker whose loop hangs in the Kafka client ends, so that it is started again and does not keep its partitions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accrual.config import Config

HANGING = """
import sys, threading
import streams.app
from accrual.config import load_config
from streams.__main__ import _host, _settings
from streams.loop import JoinLoop

streams.app.STUCK_AFTER_S, streams.app.STOPPED_WITHIN_S = float(sys.argv[1]), 1.0

class Hanging(JoinLoop):
    def run(self):
        self.report(phase="running")
        print("hanging", flush=True)
        threading.Event().wait()

config = load_config()
_host(streams.app.join_app(config, {}, Hanging(config, {}, "w"), **_settings(config, "w", "127.0.0.1", 0)))
"""

pytestmark = [pytest.mark.slow, pytest.mark.system]


def start(tmp_path: Path, stuck_after_s: float) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(stuck_after_s)],
        env={**os.environ, **Config(state=str(tmp_path)).environment(), "FAUST_LOOP": "asyncio"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "hanging\n"
    return started


def test_a_loop_that_no_longer_turns_ends_the_process(tmp_path: Path) -> None:
    hanging = start(tmp_path, stuck_after_s=3)
    _, said = hanging.communicate(timeout=30)
    assert hanging.returncode == 1
    assert "has not turned for 3 s" in said


def test_a_loop_that_does_not_stop_ends_the_process(tmp_path: Path) -> None:
    hanging = start(tmp_path, stuck_after_s=600)
    time.sleep(1)
    hanging.send_signal(signal.SIGTERM)
    _, said = hanging.communicate(timeout=30)
    assert hanging.returncode == 1
    assert "has not stopped for 1 s" in said
