"""A stream that falls silent: its predictions expire by the clock, its window is sealed, and the books balance."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accrual import Recorder
from accrual.config import Config, Kafka, Topics
from accrual.errors import LakeUnavailable
from accrual.kafka import create_topics
from accrual.lake import open_lake
from accrual.supervisor import Supervisor
from tests.system.toy import CONTRACT, emit, events

pytestmark = [pytest.mark.system, pytest.mark.slow]


def sealed(config: Config) -> list[dict[str, object]]:
    try:
        with open_lake(config) as lake:
            return lake.rows("from windows")
    except LakeUnavailable:
        return []


def test_the_last_window_of_a_silent_stream_is_sealed(bootstrap: str, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "contracts").mkdir()
    quick = CONTRACT.replace("horizon: 1d", "horizon: 5s").replace("disorder: 1h", "disorder: 1s\nidle: 2s")
    (tmp_path / "contracts" / "toy.yaml").write_text(quick.replace("late: dead_letter", "late: count"))
    config = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=2),
        state=str(tmp_path / "state"),
        contracts=str(tmp_path / "contracts"),
    )
    create_topics(config)
    sendings, _, _ = events(201, seed=3)
    with Supervisor(tmp_path / "logs", config.environment()) as supervisor:
        supervisor.start("join", [sys.executable, "-m", "streams", "worker", "--web-port", "0"])
        supervisor.start("sink", [sys.executable, "-m", "consumers", "sink"])
        with Recorder("toy", config) as recorder:
            emit(recorder, [one for one in sendings if one.kind == "prediction"], 1.0, time.sleep)
        until = time.monotonic() + 60
        while len(sealed(config)) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        assert [window["rows"] for window in sealed(config)] == [100, 100], "the youngest expired by the clock alone"
        environment = {**os.environ, **config.environment()}
        audit = [sys.executable, "-m", "consumers", "audit", "--wait", "30"]
        done = subprocess.run(audit, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
