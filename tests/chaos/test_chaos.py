"""A few seeds of the chaos suite; `make chaos SEEDS=200` runs many. ACCRUAL_CHAOS_SEEDS sets how many here."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accrual.broker import DevelopmentBroker
from tests.chaos.cluster import own_broker
from tests.chaos.faults import KINDS, plan
from tests.chaos.seed import run_seed

SEEDS = range(int(os.environ.get("ACCRUAL_CHAOS_SEEDS", "1")))


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DevelopmentBroker, int]]:
    """A broker of the suite's own: it is killed."""
    with own_broker(tmp_path_factory.mktemp("broker")) as owned:
        yield owned


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_doubled_or_wrong(broker: tuple[DevelopmentBroker, int], seed: int, tmp_path: Path) -> None:
    result = run_seed(seed, *broker, tmp_path / f"seed-{seed}")
    assert result.injected
    assert result.verdict.compared > 4_000
    assert result.verdict.clean, result.report()


@pytest.mark.system
@pytest.mark.slow
def test_an_interrupt_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos.run", "--seeds", "4", "--jobs", "2", "--folder", str(tmp_path)]
    with subprocess.Popen(command) as suite:
        deadline = time.monotonic() + 60
        while not (running := workers(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.2)
        suite.send_signal(signal.SIGINT)
        assert suite.wait(20) == 130
    assert running
    assert not workers(tmp_path)
    assert not [job for job in tmp_path.glob("job-*") if DevelopmentBroker(job).status()]
    assert not [state for state in tmp_path.glob("*/*/state") if state.is_mount()]


def workers(folder: Path) -> list[Path]:
    """The locks of the workers that run below a folder."""
    held = []
    for path in folder.glob("seed-*/*/state/join/*.lock"):
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path)
    return held


def test_a_plan_follows_from_its_seed_and_every_kind_of_fault_comes_up() -> None:
    assert [plan(seed) for seed in range(50)] == [plan(seed) for seed in range(50)]
    assert plan(1) != plan(2)
    assert {fault.kind for seed in range(20) for fault in plan(seed)} == KINDS.keys()
    assert all(plan(seed) for seed in range(1000))
